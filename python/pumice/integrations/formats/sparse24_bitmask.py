"""compressed-tensors' ``sparse-24-bitmask``: the tensors of 2:4 layers, N outputs and K inputs.

::

    compressed  floating [N, K/2]      two weights of every four, in the order of their columns
    bitmask     uint8 [N, ceil(K/8)]   bit k % 8 of byte k // 8 is set where column k is stored
    shape       int64 [2, 1]           N, K

Of every four columns exactly two bits are set; where a group has fewer nonzeros, zeros are stored.
The values are those of :func:`pumice.ops.sparse24_compress`; only the places are written otherwise.
Written by llm-compressor while compressed-tensors had the compressor (0.11 was tried; 0.20 lists
the format as a legacy one).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pumice.integrations.formats._layer import (
    FLOATING,
    INTEGERS,
    check_device,
    refuse_others,
    take,
)
from pumice.ops import sparse24_compress, sparse24_decompress

FORMAT = "sparse-24-bitmask"
TENSORS = ("compressed", "bitmask", "shape")


def read(
    tensors: Mapping[str, Tensor], *, n: int, k: int, layer: str = ""
) -> tuple[Tensor, Tensor]:
    """One layer's tensors as values and metadata of :func:`pumice.ops.sparse24_compress`.

    Args:
        tensors: by name, as listed above.
        n, k: outputs and inputs.
        layer: a name for messages.

    Raises:
        ValueError: a tensor missing, unknown, of a wrong shape or dtype, on another device than the
            rest; a group of four with other than two bits set (row and group are named).
    """
    refuse_others(tensors, TENSORS, layer)
    check_device(tensors, layer)
    if k % 4:
        raise ValueError(f"{layer!r} has {k} inputs, but 2:4 layers have a multiple of 4")
    why = f"[{n}, {k}]"
    values = take(tensors, "compressed", layer, FLOATING, (n, k // 2), why)
    bitmask = take(tensors, "bitmask", layer, (torch.uint8,), (n, -(-k // 8)), why)
    stored = tensors.get("shape")
    if stored is None or stored.dtype not in INTEGERS or stored.flatten().tolist() != [n, k]:
        shown = None if stored is None else stored.flatten().tolist()
        raise ValueError(f"'{layer}.shape' must hold {[n, k]}, not {shown}")
    mask = _bits(bitmask)
    if bool(mask[:, k:].any()):
        raise ValueError(f"'{layer}.bitmask' has bits set beyond column {k - 1}")
    mask = mask[:, :k]
    counts = mask.unflatten(1, (-1, 4)).sum(2)
    wrong = counts != 2
    if bool(wrong.any()):
        row, group = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"'{layer}.bitmask' is not 2:4: row {row}, group {group} (columns {4 * group} … "
            f"{4 * group + 3}) has {int(counts[row, group])} bits set, not 2"
        )
    dense = values.new_zeros(n, k)
    dense[mask] = values.flatten()
    return sparse24_compress(dense)


def write(values: Tensor, meta: Tensor) -> dict[str, Tensor]:
    """The inverse of :func:`read`.

    Args:
        values: floating [N, K/2].
        meta: see :func:`pumice.ops.sparse24_compress`.
    """
    mask = sparse24_decompress(torch.ones_like(values), meta) != 0
    n, k = mask.shape
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=mask.device)
    bits = torch.nn.functional.pad(mask, (0, -k % 8)).unflatten(1, (-1, 8))
    return {
        "compressed": values,
        "bitmask": (bits * weights).sum(2, dtype=torch.uint8),
        "shape": torch.tensor([[n], [k]], dtype=torch.int64),
    }


def _bits(packed: Tensor) -> Tensor:
    """bool [N, 8 · bytes], the lowest bit of each byte first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(2) >> shifts) & 1).flatten(1).bool()
