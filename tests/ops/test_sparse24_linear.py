"""sparse24_linear, sparse24_int8_linear and sparse24_int4_linear against float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pumice
import reference
from backends import Backend, backend_named
from cases import FLOATS, surrounded
from pumice import _C
from sparse24_cases import (
    SparseCase,
    dense_linear,
    packed_weight,
    run_floating,
    run_integers,
    run_packed,
    sparse_cases,
)


def check_floating(backend: Backend, case: SparseCase) -> None:
    tensors = case.floating()
    y = run_floating(backend, tensors)
    assert (y.dtype, y.shape) == (case.dtype, (case.m, case.n))
    assert y.is_contiguous()
    if case.m == 0:
        return
    exact, magnitude = dense_linear(
        tensors["x"], reference.as_float64(tensors["w"]), tensors["bias"]
    )
    # torch's product takes a bias in the dtype of x.
    bias = 0.0 if tensors["bias"] is None else np.abs(reference.as_float64(tensors["bias"]))
    errors = 2.0**-18 * magnitude + reference.ROUNDING[case.dtype] * bias
    reference.assert_rounded(y, exact, errors, extra=1.0)


def test_floating(backend: Backend) -> None:
    @backend.for_all(sparse_cases(backend))
    def holds(case: SparseCase) -> None:
        check_floating(backend, case)


def test_int8(backend: Backend) -> None:
    """Exactly what int8_linear gives for the matrix written out."""

    @backend.for_all(sparse_cases(backend))
    def holds(case: SparseCase) -> None:
        tensors = case.integers()
        y = run_integers(backend, tensors, case.dtype)
        assert (y.dtype, y.shape) == (case.dtype, (case.m, case.n))
        rest = [tensors[name] for name in ("q", "scale", "w", "weight_scale", "bias")]
        reference.assert_rounded(y, *reference.linear(*rest))
        if backend.name == "cpu":
            dense = torch.ops.pumice.int8_linear(*rest, out_dtype=case.dtype)
            assert torch.equal(y, dense)


def check_packed(backend: Backend, case: SparseCase) -> None:
    tensors = case.packed()
    y = run_packed(backend, case, tensors)
    assert (y.dtype, y.shape) == (case.dtype, (case.m, case.n))
    if case.m == 0:
        return
    weight, magnitude = packed_weight(case, tensors)
    exact, products = dense_linear(tensors["x"], weight, tensors["bias"])
    _, sizes = dense_linear(tensors["x"], magnitude, tensors["bias"])
    x = np.abs(reference.as_float64(tensors["x"]))
    padded = np.pad(x, ((0, 0), (0, -case.k % 128))).reshape(case.m, -1, 128)
    coarse = padded.max(axis=2).repeat(128, axis=1)[:, : case.k] @ np.abs(weight).T
    errors = 2.0**-18 * sizes
    if backend.name == "cpu":
        errors = errors + 2.0**-15 * coarse * (case.dtype != torch.float32)  # x in 15 bits
    else:
        errors = errors + reference.ROUNDING[case.dtype] * products  # W in the dtype of x
    reference.assert_rounded(y, exact, errors, extra=1.0)


def test_packed(backend: Backend) -> None:
    @backend.for_all(sparse_cases(backend))
    def holds(case: SparseCase) -> None:
        check_packed(backend, case)


# More rows than a kernel takes at once, chunks of the weight and of the columns; long rows.
@pytest.mark.parametrize(
    "case",
    [
        SparseCase(m=5, n=600, quads=1025, bias_dtype=torch.float32),
        SparseCase(m=140, n=70, quads=300, dtype=torch.float16, bias_dtype=torch.float16),
        SparseCase(m=1, n=301, quads=1100, dtype=torch.float32),
        SparseCase(m=4, n=130, quads=515, dtype=torch.float16, zeros="integer", group_size=32),
        SparseCase(m=300, n=67, quads=257, group_size=128, zeros="integer"),
        SparseCase(m=9, n=65, quads=128, group_size=-1, zeros="float", dtype=torch.float32),
    ],
)
def test_larger(backend: Backend, case: SparseCase) -> None:
    if backend.name == "emulated":
        case = replace(case, m=min(case.m, 70), n=min(case.n, 40), quads=min(case.quads, 100))
    check_floating(backend, case)
    check_packed(backend, case)
    tensors = case.integers()
    y = run_integers(backend, tensors, case.dtype)
    rest = [tensors[name] for name in ("q", "scale", "w", "weight_scale", "bias")]
    reference.assert_rounded(y, *reference.linear(*rest))


@pytest.mark.parametrize("m", [1, 4, 5, 64])
def test_no_less_exact_than_torch(backend: Backend, m: int) -> None:
    """At most twice the error of the same product, dense, in the same dtype."""
    for dtype in FLOATS:
        tensors = SparseCase(m=m, n=128, quads=64, dtype=dtype).floating()
        exact, _ = dense_linear(tensors["x"], reference.as_float64(tensors["w"]), None)
        plain = torch.nn.functional.linear(tensors["x"], tensors["w"])
        error = reference.relative_error(run_floating(backend, tensors), exact)
        assert error <= 2 * reference.relative_error(plain, exact), dtype


def test_int8_overflows_nothing(backend: Backend) -> None:
    k = 131068 if backend.name != "emulated" else 4096
    q = torch.full((1, k), -128, dtype=torch.int8)
    w = torch.tensor([[-128, 0, 0, -128], [127, 0, 127, 0]], dtype=torch.int8).repeat(1, k // 4)
    one = torch.ones(1)
    tensors = {"q": q, "scale": one, "w": w, "weight_scale": one, "bias": None}
    y = run_integers(backend, tensors, torch.float32)
    assert y.tolist() == [[float(k // 2 * 2**14), float(-k // 2 * 128 * 127)]]


@pytest.mark.parametrize("shape", [(8,), (3, 2, 8), (2, 0, 8), (0, 8), (1, 1, 1, 8)])
def test_any_rank(backend: Backend, shape: tuple[int, ...]) -> None:
    case = SparseCase(n=6, quads=2, dtype=torch.float16, crowd=1.0)
    rows = torch.linspace(-1, 1, torch.Size(shape).numel()).half().reshape(shape)
    floating = {**case.floating(), "x": rows}
    y = run_floating(backend, floating)
    assert y.shape == (*shape[:-1], 6)
    packed = {**case.packed(), "x": rows}
    assert run_packed(backend, case, packed).shape == y.shape
    q = (rows.float() * 100).to(torch.int8)
    integers = {**case.integers(), "q": q, "scale": torch.ones(shape[:-1])}
    assert run_integers(backend, integers, torch.float16).shape == y.shape
    if y.numel():
        exact, magnitude = dense_linear(rows, reference.as_float64(floating["w"]), None)
        reference.assert_rounded(y, exact, magnitude, extra=2.0**-18)


def spread(tensors: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The same values, none of them neighbours."""
    return {
        name: torch.stack([t, t], dim=-1)[..., 0] if name in names and t is not None else t
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("m", [3, 7])
def test_strides(backend: Backend, m: int) -> None:
    case = SparseCase(m=m, n=9, quads=10, zeros="integer", bias_dtype=torch.float16)
    floating = case.floating()
    expected = run_floating(backend, floating)
    assert torch.equal(run_floating(backend, spread(floating, ("x", "bias"))), expected)
    packed = case.packed()
    names = ("x", "meta", "scales", "zeros", "bias")
    expected = run_packed(backend, case, packed)
    assert torch.equal(run_packed(backend, case, spread(packed, names)), expected)
    integers = case.integers()
    names = ("q", "scale", "weight_scale", "bias")
    expected = run_integers(backend, integers, torch.float16)
    assert torch.equal(run_integers(backend, spread(integers, names), torch.float16), expected)


@pytest.mark.parametrize("before", [1, 16])
def test_reads_nothing_beyond(backend: Backend, before: int) -> None:
    shapes = ((1, 5, 17), (3, 19, 33), (34, 17, 9))
    for (m, n, quads), dtype in product(shapes, (torch.bfloat16, torch.float32)):
        case = SparseCase(
            m=m, n=n, quads=quads, dtype=dtype, zeros="float", bias_dtype=torch.bfloat16
        )
        t = case.packed()
        qvalues = pumice.ops.int4_pack(t.pop("q").to(backend.device))
        given = {k: v.to(backend.device) for k, v in {**t, "qvalues": qvalues}.items()}
        inside = {k: surrounded(v, before) for k, v in given.items()}
        run = pumice.ops.sparse24_int4_linear
        assert torch.equal(run(**inside, group_size=64), run(**given, group_size=64))
        f = case.floating()
        values, meta = pumice.ops.sparse24_compress(f["w"].to(backend.device))
        tensors = [f["x"].to(backend.device), values, meta, f["bias"].to(backend.device)]
        inside_list = [surrounded(v, before) for v in tensors]
        assert torch.equal(
            pumice.ops.sparse24_linear(*inside_list), pumice.ops.sparse24_linear(*tensors)
        )
        assert torch.equal(pumice.ops.sparse24_decompress(*inside_list[1:3]).cpu(), f["w"])


def by_rows(backend: Backend, run: Any, tensors: dict[str, Any], names: tuple[str, ...]) -> Tensor:
    parts = []
    for i in range(len(tensors[names[0]])):
        parts.append(run({**tensors, **{name: tensors[name][i : i + 1] for name in names}}))
    return torch.cat(parts)


def test_few_rows_do_not_see_each_other() -> None:
    """On the CPU: to the bit what each gives alone."""
    backend = backend_named("cpu")
    for dtype in FLOATS:
        case = SparseCase(m=2, n=37, quads=83, dtype=dtype, zeros="integer")
        floating = case.floating()
        together = run_floating(backend, floating)
        alone = by_rows(backend, partial(run_floating, backend), floating, ("x",))
        assert torch.equal(together, alone)
        if _C.cpu_isa() == "portable":  # packed weights are multiplied by torch there
            continue
        packed = case.packed()
        together = run_packed(backend, case, packed)
        alone = by_rows(backend, partial(run_packed, backend, case), packed, ("x",))
        assert torch.equal(together, alone)


@pytest.mark.parametrize("m", [2, 6, 40])
def test_nan(backend: Backend, m: int) -> None:
    """Of x: in its row, at least where it is kept. Of values: in its column of y, in every row."""
    nan = float("nan")
    w = torch.zeros(3, 32, dtype=torch.bfloat16)
    w[0, 5], w[1, 6], w[2, 30] = 1.0, 2.0, nan
    x = torch.ones(m, 32, dtype=torch.bfloat16)
    x[1, 5] = nan
    y = run_floating(backend, {"x": x, "w": w, "bias": None}).float().cpu()
    assert y[:, 2].isnan().all()
    assert y[1, 0].isnan()
    rest = torch.arange(m) != 1
    assert torch.equal(y[rest, :2], torch.tensor([[1.0, 2.0]]).expand(m - 1, 2))
    case = SparseCase(m=m, n=5, quads=8, group_size=32)
    tensors = case.packed()
    tensors["x"][1] = nan
    y = run_packed(backend, case, tensors)
    assert y[1].isnan().all()
    assert y[rest.to(y.device)].isfinite().all()
