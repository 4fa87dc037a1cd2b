"""Floating 2:4 products of more than a few rows on the CPU: edges of tiles and blocks, bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import pumice
import reference
from backends import backend_named
from pumice import _C
from sparse24_cases import SparseCase, dense_linear, run_floating

CPU = backend_named("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# More rows than are few for any dtype and instruction set.
MANY = 13
panels_only = pytest.mark.skipif(
    _C.cpu_isa() == "portable", reason="torch multiplies there, in an order of its own"
)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(case: SparseCase) -> None:
    tensors = case.floating()
    exact, magnitude = dense_linear(
        tensors["x"], reference.as_float64(tensors["w"]), tensors["bias"]
    )
    bias = 0.0 if tensors["bias"] is None else np.abs(reference.as_float64(tensors["bias"]))
    errors = 2.0**-18 * magnitude + reference.ROUNDING[case.dtype] * bias
    reference.assert_rounded(run_floating(CPU, tensors), exact, errors, extra=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_tile(dtype: torch.dtype) -> None:
    """One tile of each height, the last of several, and rows that fill a block of them."""
    for m in (*range(1, 27), 255, 256, 257):
        check(SparseCase(m=m, n=19, quads=21, dtype=dtype, bias_dtype=torch.float32, seed=m))


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_every_panel(dtype: torch.dtype) -> None:
    """Panels with one row, full ones and one more; as many as lie side by side, and beyond."""
    for n in (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 130):
        check(SparseCase(m=MANY, n=n, quads=20, dtype=dtype, bias_dtype=dtype, seed=n))


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_every_block(dtype: torch.dtype) -> None:
    """Words of places, registers of kept weights and blocks of K, with one group more or less."""
    for quads in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200):
        check(SparseCase(m=MANY, n=18, quads=quads, dtype=dtype, seed=quads))


@panels_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(MANY, 70), (300, 20), (300, 200)])
def test_bits_do_not_depend_on_threads(threads: None, dtype: torch.dtype, m: int, n: int) -> None:
    tensors = SparseCase(m=m, n=n, quads=260, dtype=dtype, bias_dtype=dtype).floating()
    torch.set_num_threads(1)
    expected = run_floating(CPU, tensors)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(run_floating(CPU, tensors), expected), count


@panels_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_see_each_other(dtype: torch.dtype) -> None:
    """To the bit what they give among fewer, so long as those are many too."""
    tensors = SparseCase(m=290, n=37, quads=150, dtype=dtype, bias_dtype=dtype).floating()
    together = run_floating(CPU, tensors)
    for begin, end in ((0, MANY), (5, 22), (100, 233), (277, 290)):
        fewer = run_floating(CPU, {**tensors, "x": tensors["x"][begin:end]})
        assert torch.equal(fewer, together[begin:end]), (begin, end)


@panels_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_where_it_is_kept(dtype: torch.dtype, value: float) -> None:
    case = SparseCase(m=MANY + 2, n=50, quads=70, dtype=dtype, crowd=1.0)
    tensors = case.floating()
    y = run_floating(CPU, tensors)
    column = 137
    tensors["x"][6, column] = value
    harmed = run_floating(CPU, tensors)
    _, meta = pumice.ops.sparse24_compress(tensors["w"])
    nibbles = meta[:, column // 8] >> (4 * (column // 4 % 2))
    kept = (nibbles & 3 == column % 4) | (nibbles >> 2 & 3 == column % 4)
    assert kept.any()
    assert not kept.all()
    assert not harmed[6, kept].isfinite().any()
    harmed[6, kept] = y[6, kept]
    assert torch.equal(harmed, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", ["x", "w", "sum"])
def test_subnormals(dtype: torch.dtype, of: str) -> None:
    """Counted, but for bf16, whose instruction takes what is below 2^-126 as zero."""
    tiny = 2.0**-126
    scale_x, scale_w = {
        "x": (2.0**-130, 2.0**20),
        "w": (2.0**20, 2.0**-130),
        "sum": (2.0**-70,) * 2,
    }[of]
    if dtype == torch.float16:  # its subnormals are ordinary numbers in fp32
        scale_x, scale_w = {"x": (2.0**-20, 1.0), "w": (1.0, 2.0**-20), "sum": (2.0**-10,) * 2}[of]
    tensors = SparseCase(m=MANY, n=20, quads=40, dtype=dtype).floating()
    tensors["x"] = (tensors["x"].double() * scale_x).to(dtype)
    tensors["w"] = (tensors["w"].double() * scale_w).to(dtype)
    exact, magnitude = dense_linear(tensors["x"], reference.as_float64(tensors["w"]), None)
    errors = 2.0**-18 * magnitude
    if dtype != torch.float16:
        errors = errors + 2.0**-148 * 80  # products are rounded to multiples of 2^-149
    if dtype == torch.bfloat16:
        x, w = (np.abs(reference.as_float64(tensors[name])) for name in ("x", "w"))
        lost = np.where(x < tiny, x, 0) @ w.T + x @ np.where(w < tiny, w, 0).T
        errors = errors + lost + 80 * tiny
    reference.assert_rounded(run_floating(CPU, tensors), exact, errors, extra=1.0)
