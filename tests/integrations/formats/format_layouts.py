"""The formats of other libraries, written as plain loops over bits from their definitions.

Nothing here comes from pumice: a weight is a table of small integers, and every function puts its
values where the definition says, one after the other.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

AWQ_NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds this column of its eight


@dataclass
class Weight:
    """W[n, k] = (q[n, k] - zeros[n, g]) · scales[n, g], g = g_idx[k]."""

    q: torch.Tensor  # int64 [N, K]
    zeros: torch.Tensor  # int64 [N, G]
    scales: torch.Tensor  # [N, G]
    g_idx: torch.Tensor  # int32 [K]
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.q.shape)

    def dense(self) -> torch.Tensor:
        """float32 [N, K]."""
        n, k = self.shape
        w = torch.zeros(n, k)
        for i in range(n):
            for j in range(k):
                g = self.g_idx[j]
                w[i, j] = float(self.q[i, j] - self.zeros[i, g]) * float(self.scales[i, g])
        return w


def make_weight(
    n: int,
    k: int,
    bits: int = 4,
    group_size: int = 16,
    *,
    symmetric: bool = False,
    act_order: bool = False,
    seed: int = 0,
    lowest_zero: int = 1,
    dtype: torch.dtype = torch.float16,
) -> Weight:
    """Random values, every one of the range possible; zero points from ``lowest_zero`` up."""
    generator = torch.Generator().manual_seed(seed)
    count = 1 if group_size == -1 else math.ceil(k / group_size)
    zeros = torch.randint(lowest_zero, 2**bits, (n, count), generator=generator)
    if symmetric:
        zeros = torch.full((n, count), 2 ** (bits - 1))
    g_idx = torch.tensor([0 if group_size == -1 else j // group_size for j in range(k)])
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=generator)]
    return Weight(
        q=torch.randint(0, 2**bits, (n, k), generator=generator),
        zeros=zeros,
        scales=(torch.rand(n, count, generator=generator) * 0.1 + 0.01).to(dtype),
        g_idx=g_idx.int(),
        bits=bits,
        group_size=group_size,
    )


def bit_stream(values: list[int], bits: int) -> list[int]:
    """The int32 words in which value i occupies the bits from i · bits on, lowest first."""
    stream = 0
    for i, value in enumerate(values):
        assert 0 <= value < 2**bits
        stream |= value << (i * bits)
    count = math.ceil(len(values) * bits / 32)
    return [signed((stream >> (32 * word)) & 0xFFFFFFFF) for word in range(count)]


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def int32(rows: list[list[int]]) -> torch.Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.int32))


def gptq_layer(weight: Weight, version: int = 1) -> dict[str, torch.Tensor]:
    n, _ = weight.shape
    columns = [bit_stream(weight.q[i].tolist(), weight.bits) for i in range(n)]
    offset = 1 if version == 1 else 0
    zero_rows = [
        bit_stream([int(z) - offset for z in weight.zeros[:, g]], weight.bits)
        for g in range(weight.zeros.shape[1])
    ]
    return {
        "qweight": int32([[columns[i][r] for i in range(n)] for r in range(len(columns[0]))]),
        "qzeros": int32(zero_rows),
        "scales": weight.scales.T.contiguous(),
        "g_idx": weight.g_idx.clone(),
    }


def awq_words(values: list[int]) -> list[int]:
    words = []
    for c in range(len(values) // 8):
        word = 0
        for i in range(8):
            word |= values[8 * c + AWQ_NIBBLES[i]] << (4 * i)
        words.append(signed(word))
    return words


def awq_layer(weight: Weight) -> dict[str, torch.Tensor]:
    _, k = weight.shape
    return {
        "qweight": int32([awq_words(weight.q[:, j].tolist()) for j in range(k)]),
        "qzeros": int32(
            [awq_words(weight.zeros[:, g].tolist()) for g in range(weight.zeros.shape[1])]
        ),
        "scales": weight.scales.T.contiguous(),
    }


def packed_layer(weight: Weight, *, symmetric: bool) -> dict[str, torch.Tensor]:
    """compressed-tensors, pack-quantized."""
    n, k = weight.shape
    tensors = {
        "weight_packed": int32([bit_stream(row.tolist(), weight.bits) for row in weight.q]),
        "weight_scale": weight.scales.clone(),
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        by_group = [
            bit_stream(weight.zeros[:, g].tolist(), weight.bits)
            for g in range(weight.zeros.shape[1])
        ]
        tensors["weight_zero_point"] = int32(by_group).T.contiguous()
    return tensors


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor, theirs[name]), name
