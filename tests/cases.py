"""Inputs of the operator tests: drawn by hypothesis, or made to be awkward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def size(largest: int) -> st.SearchStrategy[int]:
    """Sizes up to `largest`, with those favoured that lie around a register, a tile or a block."""
    corners = [s + d for s in (16, 32, 64, 128, 256, 512) for d in (-1, 0, 1) if s + d <= largest]
    return st.one_of(st.integers(1, largest), st.sampled_from([1, 2, 3, *corners]))


@dataclass(frozen=True)
class Case:
    """Shape, dtypes and contents of one product."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    bias_dtype: torch.dtype | None
    per_channel: bool  # weight_scale of N elements, else of one
    outliers: float  # share of the columns of x
    seed: int

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """qweight (all int8 values, -128 included), weight_scale, bias."""
        g = self.generator()
        qweight = torch.randint(-128, 128, (self.n, self.k), dtype=torch.int8, generator=g)
        scale = torch.rand(self.n if self.per_channel else 1, generator=g) * 0.01 + 0.001
        if self.bias_dtype is None:
            return qweight, scale, None
        return qweight, scale, torch.randn(self.n, generator=g).to(self.bias_dtype)

    def activations(self) -> Tensor:
        """Normal, below the threshold of 6; in some columns half of the values beyond it."""
        g = self.generator()
        x = torch.randn(self.m, self.k, generator=g).clamp(-4, 4)
        columns = torch.rand(self.k, generator=g) < self.outliers
        beyond = columns & (torch.rand(self.m, self.k, generator=g) < 0.5)
        return torch.where(beyond, 25 * x + 7 * x.sign(), x).to(self.dtype)

    def quantized(self) -> tuple[Tensor, Tensor]:
        """q (all int8 values) and a scale for each row."""
        g = self.generator()
        q = torch.randint(-128, 128, (self.m, self.k), dtype=torch.int8, generator=g)
        return q, torch.rand(self.m, generator=g) * 0.1


def cases(largest: tuple[int, int, int]) -> st.SearchStrategy[Case]:
    m, n, k = largest
    return st.builds(
        Case,
        m=st.one_of(st.just(0), size(m), size(m), size(m)),
        n=size(n),
        k=size(k),
        dtype=st.sampled_from(FLOATS),
        bias_dtype=st.sampled_from((None, *FLOATS)),
        per_channel=st.booleans(),
        outliers=st.sampled_from((0.0, 0.005, 0.1, 1.0)),
        seed=st.integers(0, 2**31 - 1),
    )


def surrounded(tensor: Tensor, before: int = 1) -> Tensor:
    """The same contiguous values amid poison: NaN before and after them, 127 for integers.

    A kernel that reads past either end and uses what it finds gives a different result. One
    element before also makes the address as odd as the dtype allows.
    """
    poison = float("nan") if tensor.dtype.is_floating_point else 127
    count = tensor.numel() + before + 67
    buffer = torch.full((count,), poison, dtype=tensor.dtype, device=tensor.device)
    inside = buffer[before : before + tensor.numel()]
    inside.copy_(tensor.reshape(-1))
    return inside.view(tensor.shape)
