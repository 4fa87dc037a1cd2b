"""Inputs of the int4 operator tests, what the operators compute of them in float64, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pumice
import reference
from backends import Backend
from cases import FLOATS
from pairwise import pairwise
from reference import Array

DEQUANTIZE_FROM = 512  # rows of x: kInt4DequantizeFrom in csrc/cuda/gemm/int4_tiles.h


@dataclass(frozen=True)
class Int4Case:
    """Shape, dtypes and options of one product."""

    m: int = 3
    n: int = 20
    k: int = 200
    dtype: torch.dtype = torch.float32
    bits: int = 4
    group_size: int = 64
    scale_dtype: torch.dtype = torch.float32
    zeros: str | None = None  # "integer", "float"
    order: str = "natural"  # "perm", "g_idx", "both"
    bias_dtype: torch.dtype | None = None
    outliers: int = 0
    rank: int = 0
    int8_activation: bool = False
    seed: int = 0

    @property
    def groups(self) -> int:
        return 1 if self.group_size == -1 else -(-self.k // self.group_size)

    @property
    def is_general_on_cuda(self) -> bool:
        """CUDA multiplies integers only where 32 columns have one zero point below 2^bits."""
        return (
            self.bits != 4
            or self.order in ("g_idx", "both")
            or self.zeros == "float"
            or (self.group_size != -1 and self.group_size % 32 != 0)
        )

    @property
    def is_dequantized_on_cuda(self) -> bool:
        """CUDA rounds all operands to the dtype of x, where it leaves the product to torch."""
        return self.m >= DEQUANTIZE_FROM and self.dtype != torch.float32

    def tensors(self) -> dict[str, Any]:
        """The arguments of int4_linear; q beside them, unpacked."""
        g = torch.Generator().manual_seed(self.seed)
        n, k, groups = self.n, self.k, self.groups
        q = torch.randint(0, 2**self.bits, (n, k), dtype=torch.uint8, generator=g)
        scales = (torch.rand(n, groups, generator=g) * 0.1 + 0.01).to(self.scale_dtype)
        zeros: Tensor | None = None
        if self.zeros == "integer":
            zeros = torch.randint(0, 2**self.bits, (n, groups), dtype=torch.uint8, generator=g)
        elif self.zeros == "float":
            zeros = (torch.rand(n, groups, generator=g) * 2**self.bits).to(self.scale_dtype)
        g_idx = perm = None
        if self.order in ("g_idx", "both"):
            g_idx = torch.randint(0, groups, (k,), dtype=torch.int32, generator=g)
        if self.order in ("perm", "both"):
            perm = torch.randperm(k, generator=g).int()
        outliers = min(self.outliers, k)
        outlier_idx = torch.randperm(k, generator=g)[:outliers].int() if outliers else None
        if outlier_idx is not None:
            # By contract the packed weight is zero there: q = zero, which float zeros cannot give.
            columns = outlier_idx.long() if perm is None else perm.argsort()[outlier_idx.long()]
            group = self.group_of(g_idx)[columns]
            if zeros is None:
                q[:, columns] = 2 ** (self.bits - 1)
            elif self.zeros == "float":
                zeros = zeros.round().clamp(0, 2**self.bits - 1)
            if zeros is not None:
                q[:, columns] = zeros[:, group].to(torch.uint8)

        def dense(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=g) * 0.3).to(self.dtype)

        return {
            "x": torch.randn(self.m, k, generator=g).to(self.dtype),
            "q": q,
            "scales": scales,
            "zeros": zeros,
            "g_idx": g_idx,
            "perm": perm,
            "bias": None if self.bias_dtype is None else dense(n).to(self.bias_dtype),
            "outlier_idx": outlier_idx,
            "outlier_weight": dense(n, outliers) if outliers else None,
            "lora_a": dense(self.rank, k) if self.rank else None,
            "lora_b": dense(n, self.rank) if self.rank else None,
        }

    def group_of(self, g_idx: Tensor | None) -> Tensor:
        """The group of each column."""
        if g_idx is not None:
            return g_idx.long()
        return torch.arange(self.k) // (self.k if self.group_size == -1 else self.group_size)

    def run(self, backend: Backend, tensors: dict[str, Any]) -> Tensor:
        """int4_linear on a backend; packed there."""
        moved = {k: v.to(backend.device) if v is not None else None for k, v in tensors.items()}
        moved["qweight"] = pumice.ops.int4_pack(moved.pop("q"), self.bits)
        return pumice.ops.int4_linear(
            **moved,
            group_size=self.group_size,
            bits=self.bits,
            int8_activation=self.int8_activation,
        )


def dequantize(case: Int4Case, tensors: dict[str, Any]) -> tuple[Array, Array]:
    """W, and the magnitude of what it is the difference of, in float64."""
    group = case.group_of(tensors["g_idx"])
    scales = reference.as_float64(tensors["scales"][:, group])
    zeros = tensors["zeros"]
    if zeros is None:
        zeros = torch.full_like(tensors["scales"], 2 ** (case.bits - 1))
    offset = reference.as_float64(zeros[:, group])
    q = reference.as_float64(tensors["q"])
    return (q - offset) * scales, (q + np.abs(offset)) * scales


def int8_rounded(x: Tensor, left_out: Tensor) -> Array:
    """Activations [M, K] to int8 with a scale for each 128, operation by operation in float32."""
    values = reference.as_float32(x).copy()
    values[:, left_out.numpy()] = 0
    out = np.zeros(values.shape)
    for begin in range(0, values.shape[1], 128):
        block = values[:, begin : begin + 128]
        absmax = np.abs(block).max(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = np.where(absmax > 0, np.float32(127) / absmax, np.float32(0))
        scale = (absmax / np.float32(127)).astype(np.float64)
        out[:, begin : begin + 128] = np.rint(block * inverse) * scale
    return out


@dataclass(frozen=True)
class Exact:
    """int4_linear in float64, and what errors of it are measured by, all [M, N]."""

    y: Array
    magnitude: Array  # of all terms added
    products: Array  # Σ_k |x| · |W|: rounded weights are wrong by a share of it
    coarse: Array  # the same with the largest |x| of each 128: fixed-point activations
    narrowed: Array  # |x·lora_aᵀ|·|lora_b|ᵀ + |bias|: wrong by a share of it if in 16 bits

    def assert_close(self, y: Tensor, extra: float = 2.0**-14) -> None:
        reference.assert_rounded(y, self.y, self.magnitude, extra=extra)


def linear(case: Int4Case, tensors: dict[str, Any]) -> Exact:
    x, perm, outlier_idx = tensors["x"], tensors["perm"], tensors["outlier_idx"]
    seen = x if perm is None else x[:, perm.long()]
    weight, magnitude = dequantize(case, tensors)
    values = reference.as_float64(seen)
    if case.int8_activation:
        left_out = torch.zeros(case.k, dtype=torch.bool)
        if outlier_idx is not None:
            left_out[outlier_idx.long()] = True
        values = int8_rounded(seen, left_out if perm is None else left_out[perm.long()])
    y = values @ weight.T
    size = np.abs(values) @ magnitude.T
    padded = np.pad(np.abs(values), ((0, 0), (0, -case.k % 128)))
    largest = padded.reshape(case.m, -1, 128).max(axis=2).repeat(128, axis=1)[:, : case.k]
    products = np.abs(values) @ np.abs(weight).T
    coarse = largest @ np.abs(weight).T
    narrowed = np.zeros_like(y)
    terms = []
    if outlier_idx is not None:
        terms.append([x[:, outlier_idx.long()], tensors["outlier_weight"].T])
    if tensors["lora_a"] is not None:
        terms.append([x, tensors["lora_a"].T, tensors["lora_b"].T])
        low_rank = reference.as_float64(x) @ reference.as_float64(tensors["lora_a"]).T
        narrowed = np.abs(low_rank) @ np.abs(reference.as_float64(tensors["lora_b"])).T
    for factors in terms:
        y = y + np.linalg.multi_dot([np.eye(case.m), *map(reference.as_float64, factors)])
        size = size + np.linalg.multi_dot(
            [np.eye(case.m), *(np.abs(reference.as_float64(factor)) for factor in factors)]
        )
    if tensors["bias"] is not None:
        y = y + reference.as_float64(tensors["bias"])
        size = size + np.abs(reference.as_float64(tensors["bias"]))
        narrowed = narrowed + np.abs(reference.as_float64(tensors["bias"]))
    return Exact(y, size, products, coarse, narrowed)


def check(backend: Backend, case: Int4Case) -> Tensor:
    """int4_linear against float64, within what its documentation promises."""
    tensors = case.tensors()
    y = case.run(backend, tensors)
    assert (y.dtype, y.shape) == (case.dtype, (case.m, case.n))
    assert y.is_contiguous()
    exact = linear(case, tensors)
    errors = 2.0**-20 * exact.magnitude
    if backend.name == "cpu":
        if not case.int8_activation and case.dtype != torch.float32:
            errors = errors + 2.0**-15 * exact.coarse  # x in 15 bits
    elif case.dtype == torch.float32:
        errors = errors + 2.0**-15 * exact.magnitude  # x, and in the general way W, as two bfloat16
    elif case.is_dequantized_on_cuda:
        errors = errors + reference.ROUNDING[case.dtype] * (exact.products + exact.narrowed)
    elif case.is_general_on_cuda:
        errors = errors + reference.ROUNDING[case.dtype] * exact.products  # W in the dtype of x
    reference.assert_rounded(y, exact.y, errors, extra=1.0)
    return y


AXES: dict[str, Sequence[Any]] = {
    "m": (1, 2, 3, 4, 5, 7, 16, 31, 33, 49),
    "n": (1, 3, 8, 17, 33, 66),
    "k": (1, 7, 16, 31, 100, 127, 128, 130, 200, 257, 515),
    "dtype": FLOATS,
    "bits": (4, 4, 4, 2, 3, 8),
    "group_size": (-1, 16, 32, 48, 64, 128, 144, 256),
    "scale_dtype": FLOATS,
    "zeros": (None, "integer", "float"),
    "order": ("natural", "perm", "g_idx", "both"),
    "bias_dtype": (None, *FLOATS),
    "outliers": (0, 1, 5),
    "rank": (0, 1, 9),
    "int8_activation": (False, False, True),
}


PAIRS = [Int4Case(seed=seed, **row) for seed, row in enumerate(pairwise(AXES))]


def fitted(backend: Backend, case: Int4Case) -> Int4Case:
    """The case as a backend can run it, and in a bearable time."""
    if backend.name == "cpu":
        return case
    m, n, k = backend.largest
    return replace(
        case, m=min(case.m, m), n=min(case.n, n), k=min(case.k, k), int8_activation=False
    )
