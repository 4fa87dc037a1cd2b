"""Inputs of the 2:4 operator tests, and what the operators compute of them in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import pumice
import reference
from backends import Backend
from cases import FLOATS, size
from reference import Array


def prune(w: Tensor, g: torch.Generator, crowd: float = 1.0) -> Tensor:
    """w with at most two of every four left; with less than one for `crowd` often fewer."""
    four = w.view(w.shape[0], -1, 4)
    order = torch.rand(four.shape, generator=g).argsort(-1)
    kept = torch.zeros(four.shape, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    kept &= torch.rand(four.shape, generator=g) < crowd
    return torch.where(kept, four, torch.zeros((), dtype=w.dtype)).view_as(w)


def canonical(w: Tensor) -> tuple[Tensor, Tensor]:
    """values and meta by the words of csrc/common/sparse24_layout.h."""
    n, k = w.shape
    four = w.reshape(n, k // 4, 4)
    # The nonzeros (NaN is one, -0.0 is none) and then the zeros, each from the lowest column on.
    order = (four == 0).to(torch.uint8).argsort(dim=-1, stable=True)
    places = order[..., :2].sort(dim=-1).values
    nibbles = np.full((n, -(-k // 32) * 8), 0x4, dtype=np.uint8)
    nibbles[:, : k // 4] = (places[..., 0] | places[..., 1] << 2).numpy()
    meta = torch.from_numpy(nibbles[:, 0::2] | nibbles[:, 1::2] << 4)
    return four.gather(-1, places).reshape(n, k // 2), meta


@dataclass(frozen=True)
class SparseCase:
    """Shape and dtypes of one product; K = 4 · quads."""

    m: int = 3
    n: int = 20
    quads: int = 25
    dtype: torch.dtype = torch.bfloat16
    bias_dtype: torch.dtype | None = None
    crowd: float = 0.9  # share of the kept places that hold a weight
    group_size: int = 64
    bits: int = 4
    scale_dtype: torch.dtype = torch.float16
    zeros: str | None = None
    seed: int = 0

    @property
    def k(self) -> int:
        return 4 * self.quads

    @property
    def groups(self) -> int:
        return 1 if self.group_size == -1 else -(-self.k // self.group_size)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def bias(self) -> Tensor | None:
        if self.bias_dtype is None:
            return None
        return torch.randn(self.n, generator=self.generator()).to(self.bias_dtype)

    def floating(self) -> dict[str, Any]:
        """x, w (2:4, dense) and bias."""
        g = self.generator()
        return {
            "x": torch.randn(self.m, self.k, generator=g).to(self.dtype),
            "w": prune(torch.randn(self.n, self.k, generator=g).to(self.dtype), g, self.crowd),
            "bias": self.bias(),
        }

    def integers(self) -> dict[str, Any]:
        """q, scale, w (2:4, dense, all int8 values), weight_scale and bias."""
        g = self.generator()
        w = torch.randint(-128, 128, (self.n, self.k), dtype=torch.int8, generator=g)
        return {
            "q": torch.randint(-128, 128, (self.m, self.k), dtype=torch.int8, generator=g),
            "scale": torch.rand(self.m, generator=g) * 0.1,
            "w": prune(w, g, self.crowd),
            "weight_scale": torch.rand(self.n, generator=g) * 0.01,
            "bias": self.bias(),
        }

    def packed(self) -> dict[str, Any]:
        """x, q [N, K/2] (unpacked), meta, scales, zeros and bias."""
        g = self.generator()
        shape = (self.n, self.groups)
        mask = prune(torch.ones(self.n, self.k, dtype=torch.int8), g)
        zeros: Tensor | None = None
        if self.zeros == "integer":
            zeros = torch.randint(0, 2**self.bits, shape, dtype=torch.uint8, generator=g)
        elif self.zeros == "float":
            zeros = (torch.rand(shape, generator=g) * 2**self.bits).to(self.scale_dtype)
        kept = (self.n, self.k // 2)
        return {
            "x": torch.randn(self.m, self.k, generator=g).to(self.dtype),
            "q": torch.randint(0, 2**self.bits, kept, dtype=torch.uint8, generator=g),
            "meta": canonical(mask)[1],
            "scales": (torch.rand(shape, generator=g) * 0.1 + 0.01).to(self.scale_dtype),
            "zeros": zeros,
            "bias": self.bias(),
        }


def sparse_cases(backend: Backend) -> st.SearchStrategy[SparseCase]:
    m, n, k = backend.largest
    return st.builds(
        SparseCase,
        m=st.one_of(st.just(0), size(9), size(m)),
        n=size(n),
        quads=size(k // 4),
        dtype=st.sampled_from(FLOATS),
        bias_dtype=st.sampled_from((None, *FLOATS)),
        crowd=st.sampled_from((0.5, 0.95, 1.0)),
        group_size=st.sampled_from((-1, 32, 64, 96, 128, 256)),
        bits=st.sampled_from((4, 4, 4, 4, 2, 3, 8)),
        scale_dtype=st.sampled_from(FLOATS),
        zeros=st.sampled_from((None, "integer", "float")),
        seed=st.integers(0, 2**31 - 1),
    )


def moved(tensors: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: t if t is None else t.to(device) for name, t in tensors.items()}


def run_floating(backend: Backend, tensors: dict[str, Any]) -> Tensor:
    t = moved(tensors, backend.device)
    values, meta = pumice.ops.sparse24_compress(t["w"])
    return pumice.ops.sparse24_linear(t["x"], values, meta, t["bias"])


def run_integers(backend: Backend, tensors: dict[str, Any], dtype: torch.dtype) -> Tensor:
    t = moved(tensors, backend.device)
    values, meta = pumice.ops.sparse24_compress(t.pop("w"))
    return pumice.ops.sparse24_int8_linear(values=values, meta=meta, **t, out_dtype=dtype)


def run_packed(backend: Backend, case: SparseCase, tensors: dict[str, Any]) -> Tensor:
    t = moved(tensors, backend.device)
    qvalues = pumice.ops.int4_pack(t.pop("q"), case.bits)
    return pumice.ops.sparse24_int4_linear(
        qvalues=qvalues, **t, group_size=case.group_size, bits=case.bits
    )


def scattered(values: Array, meta: Tensor, k: int) -> Array:
    """The dense matrix, place by place."""
    stream = np.unpackbits(meta.numpy(), axis=1, bitorder="little").reshape(len(values), -1, 2)
    places = stream[:, : k // 2, 0] + 2 * stream[:, : k // 2, 1]
    columns = np.arange(k // 2) // 2 * 4 + places
    dense = np.zeros((len(values), k))
    np.put_along_axis(dense, columns, values, axis=1)
    return dense


def packed_weight(case: SparseCase, tensors: dict[str, Any]) -> tuple[Array, Array]:
    """W, and the magnitude of what it is the difference of, in float64."""
    group = torch.arange(case.k // 2) * 2 // (case.k if case.group_size == -1 else case.group_size)
    zeros = tensors["zeros"]
    if zeros is None:
        zeros = torch.full((case.n, case.groups), 2 ** (case.bits - 1))
    scales = reference.as_float64(tensors["scales"][:, group])
    offset = reference.as_float64(zeros[:, group])
    q = reference.as_float64(tensors["q"])
    meta = tensors["meta"]
    return (
        scattered((q - offset) * scales, meta, case.k),
        scattered((q + np.abs(offset)) * scales, meta, case.k),
    )


def dense_linear(x: Tensor, w: Array, bias: Tensor | None) -> tuple[Array, Array]:
    """x · wᵀ + bias in float64, and the magnitude of the terms."""
    values = reference.as_float64(x).reshape(-1, w.shape[1])
    offset = np.zeros(len(w)) if bias is None else reference.as_float64(bias)
    return values @ w.T + offset, np.abs(values) @ np.abs(w).T + np.abs(offset)
