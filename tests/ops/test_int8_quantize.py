"""int8_quantize: bit for bit what its formula says, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import pumice
import reference
from backends import Backend
from cases import FLOATS, Case, cases, surrounded

SPECIALS = [0.0, -0.0, 1e-45, -1e-40, 1e-31, 7.9e-31, 1e-30, 6.0, -6.0, 1.0, 127.0, 3e38]
NOT_FINITE = [math.nan, math.inf, -math.inf]


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, got, wanted in zip(("q", "scale", "outliers"), actual, expected, strict=True):
        got = got.cpu()
        assert got.dtype == wanted.dtype, name
        assert got.shape == wanted.shape, name
        assert got.is_contiguous(), name
        assert torch.equal(got.nan_to_num(-1.0), wanted.nan_to_num(-1.0)), name


def check(backend: Backend, x: Tensor, **options: Any) -> None:
    moved = {
        name: value.to(backend.device) if isinstance(value, Tensor) else value
        for name, value in options.items()
    }
    actual = pumice.ops.int8_quantize(x.to(backend.device), **moved)
    assert_same(actual, reference.quantize(x, **options))


def sprinkled(case: Case, values: list[float]) -> Tensor:
    """The activations of a case with awkward values here and there."""
    g = case.generator()
    x = case.activations()
    pool = torch.tensor(values).to(case.dtype)
    chosen = pool[torch.randint(len(values), x.shape, generator=g)]
    return torch.where(torch.rand(x.shape, generator=g) < 0.05, chosen, x)


THRESHOLDS = st.sampled_from([None, 6.0, 0.5, 1e-30, 25.0, math.inf])


def test_bits(backend: Backend) -> None:
    @backend.for_all(st.tuples(cases(backend.largest), st.booleans(), THRESHOLDS, st.booleans()))
    def check_case(drawn: tuple[Case, bool, float | None, bool]) -> None:
        case, per_tensor, threshold, smoothed = drawn
        smooth = torch.rand(case.k, generator=case.generator()) * 3 if smoothed else None
        x = sprinkled(case, SPECIALS)
        check(backend, x, per_tensor=per_tensor, threshold=threshold, smooth=smooth)


def test_not_finite(backend: Backend) -> None:
    @backend.for_all(st.tuples(cases(backend.largest), st.booleans(), THRESHOLDS))
    def check_case(drawn: tuple[Case, bool, float | None]) -> None:
        case, per_tensor, threshold = drawn
        x = sprinkled(case, NOT_FINITE + SPECIALS)
        check(backend, x, per_tensor=per_tensor, threshold=threshold)


def test_static_scale(backend: Backend) -> None:
    @backend.for_all(st.tuples(cases(backend.largest), st.sampled_from([0.05, 1e-3, 7.0, 1e-38])))
    def check_case(drawn: tuple[Case, float]) -> None:
        case, scale = drawn
        x = sprinkled(case, NOT_FINITE + SPECIALS)
        check(backend, x, per_tensor=True, scale=torch.tensor([scale]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_16_bit_value(backend: Backend, dtype: torch.dtype) -> None:
    """Conversions and ties: all 65536 patterns of a 16-bit type (of fp32: as many ties)."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    x = patterns.view(dtype) if dtype != torch.float32 else torch.arange(-32768, 32768) / 512.0
    x = x.float().nan_to_num(1.0, 2.0, -2.0).to(dtype).reshape(-1, 256)
    if backend.name == "emulated":
        x = x[::8]
    check(backend, x)
    check(backend, x, per_tensor=True)
    check(backend, x, threshold=6.0)


@pytest.mark.parametrize("shape", [(7,), (3, 5, 8), (2, 0, 4), (0, 6), (1, 1), (2, 1, 2, 33)])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_any_rank(backend: Backend, shape: tuple[int, ...], per_tensor: bool) -> None:
    x = torch.linspace(-9, 8, math.prod(shape)).reshape(shape)
    check(backend, x, per_tensor=per_tensor, threshold=6.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.linspace(-9, 8, 12 * 34).to(dtype).reshape(12, 34)
    for view in (x.t(), x[::3, 1::2], x[:, 5:20], x.expand(2, 12, 34), x.reshape(3, 4, 34).mT):
        check(backend, view, threshold=6.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("before", [1, 8])
def test_reads_nothing_beyond(backend: Backend, dtype: torch.dtype, before: int) -> None:
    x = torch.linspace(-9, 8, 5 * 67).to(dtype).reshape(5, 67)
    smooth = torch.linspace(0.5, 2, 67)
    expected = reference.quantize(x, threshold=6.0, smooth=smooth)
    inside = [surrounded(t.to(backend.device), before) for t in (x, smooth)]
    actual = pumice.ops.int8_quantize(inside[0], threshold=6.0, smooth=inside[1])
    assert_same(actual, expected)


def test_repeats_its_bits(backend: Backend) -> None:
    x = torch.randn(40, 130).to(backend.device)
    first = pumice.ops.int8_quantize(x, threshold=2.0)
    for _ in range(3):
        assert_same(pumice.ops.int8_quantize(x, threshold=2.0), tuple(t.cpu() for t in first))


def test_meta_tensors() -> None:
    q, scale, outliers = pumice.ops.int8_quantize(torch.empty(3, 5, 7, device="meta"))
    assert (q.shape, q.dtype, q.device.type) == ((3, 5, 7), torch.int8, "meta")
    assert (scale.shape, scale.dtype) == ((3, 5), torch.float32)
    assert (outliers.shape, outliers.dtype) == ((7,), torch.bool)
    per_tensor = pumice.ops.int8_quantize(torch.empty(3, 5, device="meta"), per_tensor=True)
    assert per_tensor[1].shape == (1,)


@pytest.mark.parametrize(
    "options",
    [{}, {"per_tensor": True}, {"threshold": 2.0}, {"per_tensor": True, "static": True}],
    ids=str,
)
def test_opcheck(backend: Backend, options: dict[str, Any]) -> None:
    options = dict(options)
    if options.pop("static", False):
        options["scale"] = torch.tensor([0.1], device=backend.device)
    x = torch.randn(3, 5, 19, device=backend.device)
    torch.library.opcheck(backend.ops.int8_quantize.default, (x,), options)


def test_compiles_for_any_shape(backend: Backend) -> None:
    def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return pumice.ops.int8_quantize(x * 2, threshold=6.0)

    compiled = backend.compile(quantize)
    for m, k in ((3, 17), (9, 40), (1, 5)):
        x = torch.randn(m, k, device=backend.device) * 3
        assert_same(compiled(x), tuple(t.cpu() for t in quantize(x)))


def test_is_not_differentiable(backend: Backend) -> None:
    x = torch.randn(2, 8, device=backend.device, requires_grad=True)
    _, scale, _ = pumice.ops.int8_quantize(x)
    with pytest.raises(RuntimeError, match="int8_quantize is not differentiable"):
        scale.sum().backward()


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "int8_quantize: x must be a torch.Tensor, not list", {"x": [1.0]}),
        (TypeError, "x must be float32 or float16 or bfloat16, not float64", {"x": X.double()}),
        (TypeError, "x must be .*, not int8", {"x": X.to(torch.int8)}),
        (ValueError, "x must have shape .*, but it is a scalar", {"x": torch.tensor(1.0)}),
        (ValueError, "last dimension of x is empty", {"x": torch.ones(3, 0)}),
        (ValueError, "threshold must be positive .*, not 0", {"x": X, "threshold": 0.0}),
        (ValueError, "threshold must be positive .*, not -1", {"x": X, "threshold": -1}),
        (ValueError, "threshold must be positive .*, not nan", {"x": X, "threshold": math.nan}),
        (TypeError, "threshold must be a float, not str", {"x": X, "threshold": "6"}),
        (ValueError, r"smooth must have shape \[4\], not \[3\]", {"x": X, "smooth": torch.ones(3)}),
        (
            TypeError,
            "smooth must be float32, not float16",
            {"x": X, "smooth": torch.ones(4).half()},
        ),
        (ValueError, "pass per_tensor=True", {"x": X, "scale": torch.ones(1)}),
        (
            ValueError,
            "scale and threshold exclude each other",
            {"x": X, "scale": torch.ones(1), "per_tensor": True, "threshold": 6.0},
        ),
        (
            ValueError,
            r"scale must have shape \[1\], not \[2\]",
            {"x": X, "scale": torch.ones(2), "per_tensor": True},
        ),
        (
            ValueError,
            "smooth is on meta, but x is on cpu",
            {"x": X, "smooth": torch.ones(4, device="meta")},
        ),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        pumice.ops.int8_quantize(**arguments)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("x must be float32", {"x": X.double()}),
        ("at least one dimension", {"x": torch.tensor(1.0)}),
        ("threshold must be positive", {"x": X, "threshold": 0.0}),
        ("smooth must be a vector of 4 elements", {"x": X, "smooth": torch.ones(3)}),
        ("per_tensor=True", {"x": X, "scale": torch.ones(1)}),
    ],
)
def test_second_wall(backend: Backend, message: str, arguments: dict[str, Any]) -> None:
    """Callers of torch.ops, past the Python checks."""
    moved = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"int8_quantize: .*{message}"):
        backend.ops.int8_quantize(**moved)
