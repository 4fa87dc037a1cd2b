"""Print one digest of many results of sampling: a program for test_sampling_isa.py to run.

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

# Around registers (4, 8, 16 lanes) and chunks (128).
VOCABS = (1, 3, 4, 9, 31, 33, 127, 128, 129, 257, 1000, 5003)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FILTERS = (
    {},
    {"temperature": 0.0},
    {"temperature": 0.37},
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.02},
    {"temperature": 1.9, "top_k": 300, "top_p": 0.99, "min_p": 0.001},
)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def main() -> None:
    digest = hashlib.sha256()
    g = torch.Generator().manual_seed(0)
    for vocab, dtype, filters in itertools.product(VOCABS, DTYPES, FILTERS):
        x = torch.randn(4, vocab, generator=g) * 4
        x[1] = x[1].round()
        x[2] = torch.where(torch.rand(vocab, generator=g) < 0.3, float("nan"), x[2])
        uniforms = torch.rand(4, generator=g)
        probs = pumice.ops.sampling_probs(x.to(dtype), **filters)
        digest.update(bits(probs.nan_to_num(-1)))
        tokens, _ = pumice.ops.sample(x.to(dtype), uniforms=uniforms, **filters)
        digest.update(bits(tokens))
        target = torch.stack([probs, probs.roll(1, -1), probs]).nan_to_num(0)
        drafts = tokens.expand(3, 4)[:, :2].contiguous()
        parents = torch.tensor([[-1, -1], [-1, 0], [-1, -1]], dtype=torch.int32)
        for draft in (None, target[:, :2].roll(1, -1)):
            for result in pumice.ops.speculative_verify_tree(
                drafts, parents, target[:, :3], draft_probs=draft,
                seeds=tokens[:3], positions=tokens[1:],
            ):  # fmt: skip
                digest.update(bits(result))
    print(json.dumps({"isa": _C.cpu_isa(), "digest": digest.hexdigest()}))


main()
