"""Print one digest of many results of the CPU kernels: a program for test_isa.py to run.

The instruction set is chosen once in a process, by PUMICE_CPU_ISA.
"""

from __future__ import annotations

import hashlib
import itertools
import json

import torch
from torch import Tensor

import pumice
from pumice import _C

# Around the tiles (3, 4, 6 rows; 4 columns), registers (16, 64 bytes) and blocks (16, 128 rows).
ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 16, 17, 31, 128, 131)
COLUMNS = (1, 3, 4, 5, 66)
INNER = (1, 15, 16, 17, 63, 64, 65, 127, 200, 513)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def main() -> None:
    digests = {name: hashlib.sha256() for name in ("quantize", "linear", "mixed")}
    g = torch.Generator().manual_seed(0)
    dtypes = itertools.cycle(DTYPES)
    for m, n, k in itertools.product(ROWS, COLUMNS, INNER):
        dtype = next(dtypes)
        x = torch.randn(m, k, generator=g) * 2.5  # one in 60 beyond a threshold of 6
        x = x.to(dtype)
        q = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=g)
        qweight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
        scale, weight_scale = torch.rand(m, generator=g), torch.rand(n, generator=g) * 0.01
        bias = torch.randn(n, generator=g)

        broken = torch.where(torch.rand(m, k, generator=g) < 0.01, float("inf"), x)
        smooth = torch.rand(k, generator=g)
        for options in ({}, {"threshold": 4.0}, {"per_tensor": True}, {"smooth": smooth}):
            for result in pumice.ops.int8_quantize(broken, **options):
                digests["quantize"].update(bits(result))
        y = pumice.ops.int8_linear(q, scale, qweight, weight_scale, bias, out_dtype=dtype)
        digests["linear"].update(bits(y))
        for per_element in (False, True):
            y = pumice.ops.int8_mixed_linear(
                x, qweight, weight_scale, bias, threshold=6.0, per_element=per_element
            )
            digests["mixed"].update(bits(y))
    # Conversions to 16 bit, of every magnitude.
    scale = torch.randint(-(2**31), 2**31, (100_000,), generator=g).to(torch.int32)
    scale = scale.view(torch.float32).nan_to_num()
    one = torch.ones(1, 1, dtype=torch.int8)
    for dtype in DTYPES:
        y = pumice.ops.int8_linear(
            one.expand(len(scale), 1), scale, one, torch.ones(1), out_dtype=dtype
        )
        digests["linear"].update(bits(y))
    found = {name: digest.hexdigest() for name, digest in digests.items()}
    print(json.dumps({"isa": _C.cpu_isa(), **found}))


main()
