"""int4_linear against float64, in every combination of two of its options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pumice
import reference
from backends import Backend
from cases import FLOATS, surrounded
from int4_cases import PAIRS, Int4Case, check, dequantize, fitted, linear


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_pairs(backend: Backend, index: int) -> None:
    if backend.name == "emulated" and index % 4:
        pytest.skip("a quarter of the cases: the emulator takes a second for each")
    check(backend, fitted(backend, PAIRS[index]))


# More rows than a tile, a block of rows and what a call of a kernel takes; K of several blocks.
@pytest.mark.parametrize(
    "case",
    [
        Int4Case(m=130, n=40, k=1200, group_size=128, dtype=torch.bfloat16, zeros="integer"),
        Int4Case(m=300, n=20, k=640, group_size=32, int8_activation=True),
        Int4Case(m=67, n=100, k=4224, group_size=-1, dtype=torch.float16),
        Int4Case(m=8, n=70, k=4300, group_size=128, zeros="float", bias_dtype=torch.float32),
        Int4Case(m=1, n=300, k=2048, group_size=16, dtype=torch.float16, order="perm"),
    ],
)
def test_larger(backend: Backend, case: Int4Case) -> None:
    if backend.name == "emulated":
        case = replace(case, m=min(case.m, 70), n=min(case.n, 40), k=min(case.k, 400))
    check(backend, fitted(backend, case))


@pytest.mark.parametrize("shape", [(7,), (3, 2, 7), (2, 0, 7), (0, 7), (1, 1, 1, 7)])
def test_any_rank(backend: Backend, shape: tuple[int, ...]) -> None:
    case = Int4Case(m=1, n=6, k=7, group_size=16)
    tensors = case.tensors()
    tensors["x"] = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    y = case.run(backend, tensors)
    assert y.shape == (*shape[:-1], 6)
    rows = replace(case, m=max(1, y.numel() // 6))
    if y.numel():
        tensors["x"] = tensors["x"].reshape(-1, 7)
        linear(rows, tensors).assert_close(y)


def test_strides(backend: Backend) -> None:
    case = Int4Case(m=6, n=9, k=40, group_size=16, zeros="integer", order="perm", outliers=2,
                    rank=3, bias_dtype=torch.float16)  # fmt: skip
    tensors = case.tensors()
    expected = case.run(backend, tensors)
    spread = {
        name: None if t is None else torch.stack([t, t], dim=-1)[..., 0]
        for name, t in tensors.items()
    }
    assert torch.equal(case.run(backend, spread), expected)


@pytest.mark.parametrize("int8_activation", [False, True])
@pytest.mark.parametrize("before", [1, 16])
def test_reads_nothing_beyond(backend: Backend, before: int, int8_activation: bool) -> None:
    for m, n, k in ((1, 5, 67), (3, 19, 129), (34, 17, 40)):
        case = Int4Case(m=m, n=n, k=k, group_size=16, zeros="float", order="perm", outliers=2,
                        rank=3, bias_dtype=torch.bfloat16,
                        int8_activation=int8_activation and backend.name == "cpu")  # fmt: skip
        tensors = case.tensors()
        expected = case.run(backend, tensors)
        options = {"group_size": 16, "int8_activation": case.int8_activation}
        moved = {k: v.to(backend.device) if v is not None else None for k, v in tensors.items()}
        moved["qweight"] = pumice.ops.int4_pack(moved.pop("q"))
        inside = {k: v if v is None else surrounded(v, before) for k, v in moved.items()}
        assert torch.equal(pumice.ops.int4_linear(**inside, **options), expected)


@pytest.mark.parametrize("m", [2, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_broken_row_stays_alone(backend: Backend, m: int, bad: float, dtype: torch.dtype) -> None:
    for int8_activation in (False, True) if backend.name == "cpu" else (False,):
        case = Int4Case(m=m, n=18, k=150, dtype=dtype, int8_activation=int8_activation)
        tensors = case.tensors()
        expected = case.run(backend, tensors)
        tensors["x"] = tensors["x"].clone()
        tensors["x"][1, 140] = bad
        y = case.run(backend, tensors)
        weight, _ = dequantize(case, tensors)
        touched = torch.from_numpy(weight[:, 140] != 0)
        assert not y[1].cpu()[touched].isfinite().any()
        others = [i for i in range(m) if i != 1]
        assert torch.equal(y[others], expected[others])


def test_large_and_tiny_values(backend: Backend) -> None:
    """Near the ends of float32's range, and blocks far apart in size; nothing overflows inside."""
    for size in (2.0**-90, 2.0**60, 2.0**110):
        case = Int4Case(m=2, n=5, k=260, scale_dtype=torch.float32)
        tensors = case.tensors()
        tensors["x"] = tensors["x"] * size
        tensors["x"][:, 128:] *= 2.0**-12
        linear(case, tensors).assert_close(case.run(backend, tensors))
    zero = Int4Case(m=2, n=5, k=260)
    tensors = zero.tensors()
    tensors["x"] = torch.zeros(2, 260)
    assert not zero.run(backend, tensors).any()


def test_repeats_its_bits(backend: Backend) -> None:
    for m in (3, 40):
        case = Int4Case(m=m, n=50, k=130, dtype=torch.bfloat16, zeros="integer", rank=2)
        tensors = case.tensors()
        first = case.run(backend, tensors)
        for _ in range(3):
            assert torch.equal(case.run(backend, tensors), first)


def plain_torch(case: Int4Case, tensors: dict[str, Any]) -> Tensor:
    """Dequantize and multiply with torch's operators in the dtype of x."""
    group = case.group_of(None)
    q = tensors["q"].to(torch.float32) - 2 ** (case.bits - 1)
    weight = (q * tensors["scales"].float()[:, group]).to(case.dtype)
    return tensors["x"] @ weight.T


@pytest.mark.parametrize("outlying", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [4, 64])
def test_no_worse_than_plain_torch(
    backend: Backend, dtype: torch.dtype, m: int, outlying: bool
) -> None:
    """At most twice the error of what one writes without this operator, outliers or not."""
    if backend.name == "emulated":
        pytest.skip("too much for the emulator")
    if backend.name == "cuda" and dtype == torch.float32:
        pytest.skip("CUDA multiplies float32 as two bfloat16")
    case = Int4Case(m=m, n=96, k=1024, dtype=dtype, scale_dtype=dtype, group_size=128)
    tensors = case.tensors()
    if outlying:
        tensors["x"][:, ::100] *= 300
    exact = linear(case, tensors).y
    error = reference.relative_error(case.run(backend, tensors), exact)
    # float32 sums of torch are good to a few units in the last place whatever the data.
    floor = 2.0**-23 if dtype == torch.float32 else 0.0
    assert error <= 2 * max(reference.relative_error(plain_torch(case, tensors), exact), floor)


def test_int8_activation_error(backend: Backend) -> None:
    """What int8 activations cost: 1/254 of a block's largest value at most, 0.8 % of y here."""
    if backend.name != "cpu":
        pytest.skip("int8 activations have kernels on the CPU only")
    case = Int4Case(m=16, n=64, k=1024, group_size=128)
    tensors = case.tensors()
    exact = linear(case, tensors).y
    y = replace(case, int8_activation=True).run(backend, tensors)
    error = reference.relative_error(y, exact)
    assert 0.003 < error < 0.012
    rounded = linear(replace(case, int8_activation=True), tensors)
    assert (np.abs(rounded.y - exact) <= rounded.coarse / 254).all()


def test_outlier_columns_do_not_coarsen_int8(backend: Backend) -> None:
    """A huge activation in an outlier column costs the others in its block nothing."""
    if backend.name != "cpu":
        pytest.skip("int8 activations have kernels on the CPU only")
    case = Int4Case(m=4, n=16, k=128, outliers=1, int8_activation=True)
    tensors = case.tensors()
    tensors["x"][:, tensors["outlier_idx"].long()] = 1e4
    exact = linear(replace(case, int8_activation=False), tensors).y
    y = reference.as_float64(case.run(backend, tensors))
    without = exact - 1e4 * reference.as_float64(tensors["outlier_weight"]).T
    error = np.abs(y - exact)
    assert error.max() < 0.05 * np.abs(without).max()
