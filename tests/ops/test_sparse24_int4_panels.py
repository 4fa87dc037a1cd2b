"""Tiles, spans and zero points of the packed 2:4 product, and what its rows owe each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_sparse24_linear import check_packed

import pumice
import reference
from backends import Backend, backend_named
from pairwise import pairwise
from pumice import _C
from sparse24_cases import (
    SparseCase,
    dense_linear,
    packed_weight,
    run_packed,
    scattered,
)

# Rows around tiles of 4 and 8 and blocks of them; columns around panels of 8 and 16; K around
# chunks of 16, words of 32 and blocks of 128 columns; groups that share words, blocks or neither.
CASES = pairwise(
    {
        "m": (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 31, 67),
        "n": (1, 7, 8, 9, 15, 16, 17, 33, 50),
        "quads": (1, 3, 4, 5, 8, 31, 32, 33, 40, 63, 64, 65, 97, 130),
        "group_size": (-1, 32, 64, 96, 128, 160, 192, 256),
        "zeros": (None, "integer", "float"),
        "dtype": (torch.float32, torch.float16, torch.bfloat16),
        "scale_dtype": (torch.float32, torch.float16, torch.bfloat16),
        "bias_dtype": (None, torch.float32, torch.bfloat16),
    }
)


@pytest.mark.parametrize("part", range(8))
def test_shapes(backend: Backend, part: int) -> None:
    for i, values in enumerate(CASES[part::8]):
        case = SparseCase(**values, seed=i)
        if backend.name != "cpu":
            case = replace(case, m=min(case.m, 13), dtype=torch.bfloat16)
        check_packed(backend, case)


@pytest.mark.parametrize("zeros", [None, "integer", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_and_many_give_the_same(dtype: torch.dtype, zeros: str | None) -> None:
    """On the CPU: to the bit what each row gives alone, in tiles of any size and blocks of them."""
    if _C.cpu_isa() == "portable":  # packed weights are multiplied by torch there
        pytest.skip("no kernel of its own for packed weights")
    backend = backend_named("cpu")
    for m, group_size in ((15, 128), (11, 64), (600, 32)):
        case = SparseCase(m=m, n=19, quads=83, dtype=dtype, zeros=zeros, group_size=group_size)
        tensors = case.packed()
        together = run_packed(backend, case, tensors)
        for row in {0, 1, 7, 8, m - 4, m - 1}:
            alone = run_packed(backend, case, {**tensors, "x": tensors["x"][row : row + 1]})
            assert torch.equal(together[row : row + 1], alone), (m, row)


@pytest.mark.parametrize("zeros", [None, "integer", "float"])
@pytest.mark.parametrize("m", [1, 4, 5, 20])
def test_no_less_exact_than_dense(backend: Backend, m: int, zeros: str | None) -> None:
    """At most twice the error of int4_linear with the matrix written out."""
    if backend.name == "cpu" and _C.cpu_isa() == "portable":
        pytest.skip("no kernel of its own for packed weights")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if backend.name != "cpu" and dtype == torch.float32:
            continue
        case = SparseCase(m=m, n=48, quads=256, dtype=dtype, zeros=zeros, group_size=128)
        tensors = case.packed()
        weight, _ = packed_weight(case, tensors)
        exact, _ = dense_linear(tensors["x"], weight, None)
        error = reference.relative_error(run_packed(backend, case, tensors), exact)
        # Dense, of the middle or an integer, nothing is kept where q is the zero point; with zero
        # points in floating point a product of as many terms serves as well.
        zero = {"integer": tensors["zeros"]}.get(zeros or "", torch.full((48, case.groups), 8))
        group = torch.arange(case.k) // case.group_size
        offset = reference.as_float64(zero[:, group])
        q = reference.as_float64(tensors["q"])
        kept = scattered(q + 1, tensors["meta"], case.k)
        values = torch.from_numpy(np.where(kept > 0, kept - 1, offset)).to(torch.uint8)
        dense = pumice.ops.int4_linear(
            tensors["x"].to(backend.device),
            pumice.ops.int4_pack(values.to(backend.device)),
            tensors["scales"].to(backend.device),
            None if zeros != "integer" else tensors["zeros"].to(backend.device),
            group_size=case.group_size,
        )
        wide = tensors["scales"][:, group]
        w = (values.double().numpy() - offset) * reference.as_float64(wide)
        products, _ = dense_linear(tensors["x"], w, None)
        assert error <= 2 * reference.relative_error(dense, products), dtype


@pytest.mark.parametrize("zeros", [None, "integer", "float"])
@pytest.mark.parametrize("m", [1, 3, 9])
def test_extremes(backend: Backend, m: int, zeros: str | None) -> None:
    """Every nibble, zero point and digit at its largest: no sum of products overflows."""
    for dtype in (torch.float32, torch.bfloat16):
        case = SparseCase(m=m, n=18, quads=96, dtype=dtype, zeros=zeros, group_size=-1)
        tensors = case.packed()
        for nibble, zero in ((0, 15), (15, 0), (0, 0), (15, 15)):
            tensors["q"].fill_(nibble)
            if zeros:
                tensors["zeros"].fill_(zero)
            for value in (1.9921875, -1.9921875, 1.0, -1.0):
                tensors["x"].fill_(value)
                weight, _ = packed_weight(case, tensors)
                exact, magnitude = dense_linear(tensors["x"], weight, None)
                y = run_packed(backend, case, tensors)
                reference.assert_rounded(y, exact, 2.0**-18 * magnitude, extra=1.0)


@pytest.mark.parametrize("m", [1, 4, 6, 17])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite(backend: Backend, m: int, bad: float) -> None:
    """Is NaN in all of y on the CPU, whatever is kept of it; other rows do not notice."""
    case = SparseCase(m=m, n=21, quads=70, zeros="integer", group_size=96)
    tensors = case.packed()
    expected = run_packed(backend, case, tensors)
    tensors["x"][m // 2, 77] = bad
    y = run_packed(backend, case, tensors)
    rest = torch.arange(m) != m // 2
    assert torch.equal(y[rest.to(y.device)], expected[rest.to(y.device)])
    if backend.name == "cpu" and _C.cpu_isa() != "portable":
        assert y[m // 2].isnan().all()
    else:
        assert not torch.equal(y[m // 2], expected[m // 2])
