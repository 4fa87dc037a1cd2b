"""Shapes that take every way through int8_gemm, which small random shapes do not reach.

The names say which tile the emulated device chooses (4 SMs, 163 KB); on a GPU the same shapes are
merely products of unusual size.
"""

from __future__ import annotations

import pytest
import torch

import pumice
import reference
from backends import Backend
from cases import Case

SHAPES = {
    "64x64": (64, 64, 1024),
    "64x64, K in two parts": (40, 40, 2064),
    "64x64 shallow, unaligned rows": (70, 60, 1030),
    "128x64": (100, 100, 528),
    "128x128": (257, 300, 272),
    "128x128, K in two parts": (65, 136, 4096),
    "128x256, more tiles than blocks": (500, 530, 160),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request: pytest.FixtureRequest, backend: Backend) -> tuple[int, int, int]:
    if backend.name == "cpu":
        pytest.skip("the tiles of the CUDA kernels")
    return request.param


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_linear(backend: Backend, shape: tuple[int, int, int], out_dtype: torch.dtype) -> None:
    case = Case(*shape, out_dtype, torch.float32, True, 0.0, 3)
    q, scale = case.quantized()
    weight = case.weight()
    moved = [t.to(backend.device) for t in (q, scale, *weight)]
    y = pumice.ops.int8_linear(*moved, out_dtype=out_dtype)
    exact, magnitude = reference.linear(q, scale, *weight)
    reference.assert_rounded(y, exact, magnitude)


@pytest.mark.parametrize("share", [0.0, 0.02])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mixed_linear(
    backend: Backend, shape: tuple[int, int, int], dtype: torch.dtype, share: float
) -> None:
    check_mixed(backend, Case(*shape, dtype, torch.float32, True, share, 4))


def test_more_outlier_columns_than_the_list_holds(backend: Backend) -> None:
    """The list of columns is made in pieces, for each tile anew."""
    if backend.name == "cpu":
        pytest.skip("the list of the CUDA kernels")
    check_mixed(backend, Case(140, 150, 1300, torch.bfloat16, None, False, 1.0, 5))


def check_mixed(backend: Backend, case: Case) -> None:
    x, weight = case.activations(), case.weight()
    moved = [t if t is None else t.to(backend.device) for t in (x, *weight)]
    y = pumice.ops.int8_mixed_linear(*moved, threshold=6.0)
    exact, magnitude = reference.mixed_linear(x, *weight, 6.0, False)
    extra = (8 + case.k) * 2.0**-24 + (2.0**-15 if case.dtype == torch.float32 else 0.0)
    reference.assert_rounded(y, exact, magnitude, extra=extra)
