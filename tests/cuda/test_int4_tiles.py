"""Shapes that take every way through int4_gemm, which small random shapes do not reach.

The names say which tile the emulated device chooses (4 SMs, 163 KB); on a GPU the same shapes are
merely products of unusual size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from backends import Backend
from int4_cases import Int4Case, check

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

CASES = {
    "narrow": Int4Case(7, 70, 1032, HALF, group_size=128, zeros="integer"),
    "narrow, groups of 32": Int4Case(4, 33, 136, BRAIN, group_size=32, zeros="integer"),
    "narrow, K in two parts": Int4Case(1, 64, 8208, BRAIN, group_size=128),
    "8 tokens": Int4Case(8, 270, 520, HALF, group_size=128, zeros="integer"),
    "8 tokens, groups of 64": Int4Case(2, 260, 600, BRAIN, group_size=64, zeros="integer"),
    "narrow, K in parts, prepared": Int4Case(2, 40, 8200, HALF, group_size=-1, order="perm"),
    "16 tokens, groups of 32": Int4Case(13, 70, 552, BRAIN, group_size=32, zeros="integer"),
    "32 tokens, groups of 96": Int4Case(32, 64, 640, HALF, group_size=96, zeros="integer"),
    "64 tokens, K in two parts": Int4Case(50, 130, 2048, BRAIN, group_size=128),
    "128 tokens, two tiles along M": Int4Case(140, 100, 264, HALF, group_size=64),
    "128 tokens, nine tiles along M": Int4Case(1040, 140, 40, BRAIN, group_size=32),
    "128 tokens, rows of any address": Int4Case(70, 140, 203, HALF, group_size=32),
    "fp32, 8 tokens": Int4Case(5, 70, 600, SINGLE, group_size=32, zeros="integer"),
    "fp32, 64 tokens": Int4Case(70, 140, 200, SINGLE, group_size=128, zeros="integer"),
    "general, 64 tokens": Int4Case(70, 140, 200, HALF, group_size=16, zeros="float", bits=3),
    "general, fp32": Int4Case(9, 140, 200, SINGLE, group_size=16, order="both", bits=8),
    "all terms": Int4Case(
        140, 40, 136, HALF, group_size=32, bias_dtype=SINGLE, outliers=5, rank=3, order="perm"
    ),
    "low rank, more tokens than blocks": Int4Case(300, 8, 24, HALF, group_size=-1, rank=9),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_product(backend: Backend, case: Int4Case) -> None:
    if backend.name == "cpu":
        pytest.skip("the tiles of the CUDA kernels")
    check(backend, case)


def test_parts_of_k_add_up_in_one_order(backend: Backend) -> None:
    """Whoever takes the last ticket of a tile: the same bits."""
    if backend.name == "cpu":
        pytest.skip("the tickets of the CUDA kernels")
    case = Int4Case(3, 20, 4128, torch.float32, group_size=128)
    tensors = case.tensors()
    first = case.run(backend, tensors)
    for _ in range(4):
        assert torch.equal(case.run(backend, tensors), first)


@pytest.mark.parametrize("scale_dtype", [HALF, BRAIN, SINGLE])
def test_scales_are_applied_in_float32(backend: Backend, scale_dtype: torch.dtype) -> None:
    """Scales that fp16 could not hold, or only coarsely, do not pass through it."""
    if backend.name == "cpu":
        pytest.skip("what the CUDA kernels promise of integer zero points")
    case = Int4Case(4, 33, 256, HALF, group_size=128, scale_dtype=scale_dtype, zeros="integer")
    tiny = 2.0**-20 if scale_dtype != HALF else 2.0**-12
    tensors = case.tensors()
    tensors["scales"] = (tensors["scales"].float() * tiny).to(scale_dtype)
    tensors["x"] = tensors["x"] * 64
    y = case.run(backend, tensors).double()
    scaled = replace(case, dtype=SINGLE)
    expected = scaled.run(backend, {**tensors, "x": tensors["x"].float()}).double()
    unit = torch.finfo(HALF).smallest_normal * torch.finfo(HALF).eps
    assert ((y - expected).abs() <= 2.0**-10 * expected.abs() + unit).all()
