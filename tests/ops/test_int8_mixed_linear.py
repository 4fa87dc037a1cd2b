"""int8_mixed_linear: the formula of LLM.int8(), the error it is for, and who may disturb whom."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import pumice
import reference
from backends import Backend
from cases import FLOATS, Case, cases, surrounded

# For float32 x, CUDA keeps residuals (and, at few rows, x) as two bfloat16: 16 bits of fraction.
SPLIT = 2.0**-15

Weight = tuple[Tensor, Tensor, Tensor | None]


def run(backend: Backend, x: Tensor, weight: Weight, **options: Any) -> Tensor:
    moved = [t if t is None else t.to(backend.device) for t in (x, *weight)]
    return pumice.ops.int8_mixed_linear(*moved, **options)


def make(m: int, n: int, k: int, dtype: torch.dtype, outliers: float = 0.1) -> Any:
    """x and a weight whose bias is float32."""
    case = Case(m, n, k, dtype, torch.float32, True, outliers, 11)
    return case.activations(), case.weight()


def terms(x: Tensor, weight: Weight) -> reference.Array:
    """Σ |x·w| + |bias| [M, N]: what rounding errors are in proportion to."""
    return reference.dequantized_linear(
        *(t if t is None else t.double().abs() for t in (x, *weight))
    )


def test_formula(backend: Backend) -> None:
    """Where activations are multiplied in int8: the formula itself, to a rounding."""

    thresholds = st.sampled_from([6.0, 1e-20, 2.5, math.inf])

    @backend.for_all(st.tuples(cases(backend.largest), thresholds, st.booleans()))
    def check_case(drawn: tuple[Case, float, bool]) -> None:
        case, threshold, per_element = drawn
        x, weight = case.activations(), case.weight()
        y = run(backend, x, weight, threshold=threshold, per_element=per_element)
        assert (y.dtype, y.shape) == (case.dtype, (case.m, case.n))
        assert y.is_contiguous()
        if case.m == 0:
            return
        if backend.multiplies_in_int8(case.m):
            exact, magnitude = reference.mixed_linear(x, *weight, threshold, per_element)
            # float32 sums of the residuals' products: up to K roundings.
            extra = (8 + case.k) * 2.0**-24
        else:
            exact = reference.dequantized_linear(x, *weight)
            magnitude = terms(x, weight)
            extra = (8 + case.k) * 2.0**-24
        if backend.name != "cpu" and case.dtype == torch.float32:
            extra += SPLIT
        reference.assert_rounded(y, exact, magnitude, extra=extra)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
def test_error_beside_plain_torch(
    backend: Backend, dtype: torch.dtype, m: int, share: float
) -> None:
    """No more than twice the error of the same maths in plain torch, at the same dtype."""
    x, weight = make(m, 40, 130, dtype, share)
    exact = reference.dequantized_linear(x, *weight)
    ours = reference.relative_error(run(backend, x, weight), exact)
    plain = reference.plain_torch_mixed_linear(x, *weight, 6.0)
    split = SPLIT if backend.name != "cpu" and dtype == torch.float32 else 0.0
    assert ours <= 2 * reference.relative_error(plain, exact) + split


@pytest.mark.parametrize("dtype", FLOATS)
def test_decomposition_is_what_makes_int8_work(backend: Backend, dtype: torch.dtype) -> None:
    """The paper's point: a few huge columns ruin plain int8, and cost nothing decomposed."""
    x, weight = make(40, 40, 130, dtype, 0.0)
    x[:, ::40] *= 60  # 4 columns of 130
    exact = reference.dequantized_linear(x, *weight)
    whole = reference.relative_error(run(backend, x, weight, threshold=math.inf), exact)
    for per_element in (False, True):
        y = run(backend, x, weight, threshold=6.0, per_element=per_element)
        assert reference.relative_error(y, exact) < whole / 5


def test_without_outliers_it_is_the_int8_product(backend: Backend) -> None:
    for m in (5, 40):
        if not backend.multiplies_in_int8(m):
            continue
        for dtype in FLOATS:
            x, weight = make(m, 30, 100, dtype)
            x, *tensors = (t.to(backend.device) for t in (x, *weight))
            y = pumice.ops.int8_mixed_linear(x, *tensors, threshold=math.inf)
            q, scale, _ = pumice.ops.int8_quantize(x)
            assert torch.equal(y, pumice.ops.int8_linear(q, scale, *tensors, out_dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [2, 40])
@pytest.mark.parametrize("per_element", [False, True])
def test_with_all_outliers_it_is_the_float_product(
    backend: Backend, dtype: torch.dtype, m: int, per_element: bool
) -> None:
    x, weight = make(m, 30, 100, dtype)
    y = run(backend, x, weight, threshold=1e-20, per_element=per_element)
    exact = reference.dequantized_linear(x, *weight)
    error = reference.relative_error(y, exact)
    assert error < max(SPLIT if backend.name != "cpu" else 1e-6, 2 * reference.ROUNDING[dtype])


def test_per_element_rows_are_alone(backend: Backend) -> None:
    """Whatever the other rows hold, NaN even, a row comes out the same.

    On the CPU bit for bit. On CUDA the columns of all rows share one list, so neighbours shift a
    row's outliers in it and with that the order of a float32 sum, nothing else.
    """

    @backend.for_all(st.tuples(cases(backend.largest), st.integers(0, 2**31)))
    def check_case(drawn: tuple[Case, int]) -> None:
        case, seed = drawn
        if case.m == 0:
            return
        x, weight = case.activations(), case.weight()
        y = run(backend, x, weight, per_element=True)
        row = seed % case.m

        def assert_unchanged(result: Tensor) -> None:
            if backend.name == "cpu":
                assert torch.equal(result, y[row])
            else:
                exact, magnitude = reference.as_float64(y[row : row + 1]), terms(x, weight)[[row]]
                reference.assert_rounded(result[None], exact, magnitude)

        g = torch.Generator().manual_seed(seed)
        for scale in (100.0, 0.01, math.nan):
            neighbours = (torch.randn(x.shape, generator=g) * scale).to(case.dtype)
            neighbours[row] = x[row]
            assert_unchanged(run(backend, neighbours, weight, per_element=True)[row])
        if backend.multiplies_in_int8(1):  # the same kernel at any M
            assert_unchanged(run(backend, x[row : row + 1], weight, per_element=True)[0])


def test_whole_columns_depend_on_the_batch(backend: Backend) -> None:
    """The documented price of the paper's form, and what it buys: a smaller error."""
    x, weight = make(40, 30, 100, torch.float32, 0.0)
    quiet = run(backend, x, weight)[1:].cpu()
    x[0] = 50  # now every column holds an outlier
    loud = run(backend, x, weight)[1:].cpu()
    assert not torch.equal(loud, quiet)
    exact = reference.dequantized_linear(x, *weight)[1:]
    assert reference.relative_error(loud, exact) < reference.relative_error(quiet, exact) / 20


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [4, 40])
@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("threshold", [6.0, math.inf])
def test_not_finite(
    backend: Backend, dtype: torch.dtype, m: int, per_element: bool, threshold: float
) -> None:
    """A broken row is what a float product makes of it; the others do not notice."""
    x, weight = make(m, 30, 100, dtype, 0.02)
    weight[0][3] = 0  # Inf · 0 is NaN
    clean = reference.dequantized_linear(x, *weight)
    x[0, 7] = math.inf
    x[1, 11] = math.nan
    x[2, 7], x[2, 50] = math.inf, -math.inf
    y = reference.as_float64(run(backend, x, weight, threshold=threshold, per_element=per_element))
    with np.errstate(invalid="ignore"):
        exact = reference.dequantized_linear(x, *weight)
    np.testing.assert_array_equal(np.isnan(y[:3]), np.isnan(exact[:3]))
    infinite = np.isinf(exact)
    assert infinite[0].any()
    np.testing.assert_array_equal(y[infinite], exact[infinite])
    assert reference.relative_error(torch.from_numpy(y[3:]), clean[3:]) < 0.05


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_rows(backend: Backend, dtype: torch.dtype) -> None:
    for m in (2, 40):
        x, weight = make(m, 30, 100, dtype)
        x[0] = 0
        x[1] = 1e-40  # zero for int8, and in a product of sizes like these
        y = run(backend, x, weight).float().cpu()
        wanted = weight[2].to(dtype).float().expand(2, -1)
        torch.testing.assert_close(y[:2], wanted, rtol=0, atol=1e-30)


@pytest.mark.parametrize("shape", [(7,), (3, 2, 7), (2, 0, 7), (0, 7), (1, 1, 1, 7), (5, 8, 7)])
def test_any_rank(backend: Backend, shape: tuple[int, ...]) -> None:
    _, weight = make(1, 6, 7, torch.float32)
    x = torch.linspace(-9, 8, math.prod(shape)).reshape(shape)
    y = run(backend, x, weight)
    flat = run(backend, x.reshape(-1, 7), weight)
    assert y.shape == (*shape[:-1], 6)
    assert torch.equal(y.reshape(-1, 6), flat)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [6, 40])
def test_strides(backend: Backend, dtype: torch.dtype, m: int) -> None:
    x, (qweight, weight_scale, bias) = make(m, 12, 20, dtype)
    expected = run(backend, x, (qweight, weight_scale, bias))
    spread = [torch.stack([t, t], dim=-1)[..., 0] for t in (qweight, weight_scale, bias)]
    for view in (x.t().contiguous().t(), torch.stack([x, x])[0], torch.cat([x, x], 1)[:, :20]):
        assert torch.equal(run(backend, view, tuple(spread)), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("before", [1, 16])
def test_reads_nothing_beyond(backend: Backend, dtype: torch.dtype, before: int) -> None:
    for m, n, k in ((3, 5, 67), (40, 17, 33)):
        x, weight = make(m, n, k, dtype)
        expected = run(backend, x, weight)
        inside = [surrounded(t.to(backend.device), before) for t in (x, *weight)]
        assert torch.equal(pumice.ops.int8_mixed_linear(*inside), expected)


@pytest.mark.parametrize("m", [1, 40])
def test_repeats_its_bits(backend: Backend, m: int) -> None:
    x, weight = make(m, 50, 130, torch.float32)
    first = run(backend, x, weight)
    for _ in range(3):
        assert torch.equal(run(backend, x, weight), first)


def test_does_not_depend_on_threads(backend: Backend) -> None:
    x, weight = make(65, 70, 140, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = run(backend, x, weight)
        torch.set_num_threads(3)
        assert torch.equal(run(backend, x, weight), single)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("m", [3, 40])
def test_gradient(backend: Backend, dtype: torch.dtype, m: int) -> None:
    """dx = dy @ (weight_scale · qweight), dbias = Σ dy: straight through the quantization."""
    x, weight = make(m, 30, 100, dtype)
    x, qweight, weight_scale, bias = (t.to(backend.device) for t in (x, *weight))
    x.requires_grad_()
    bias.requires_grad_()
    y = pumice.ops.int8_mixed_linear(x.reshape(m, 1, 100), qweight, weight_scale, bias)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, torch.float32)
    dequantized = reference.as_float64(qweight) * reference.as_float64(weight_scale)[:, None]
    dx = reference.as_float64(dy).reshape(m, -1) @ dequantized
    assert reference.relative_error(x.grad, dx) < 3 * reference.ROUNDING[dtype]
    dbias = reference.as_float64(dy).reshape(m, -1).sum(0)
    assert reference.relative_error(bias.grad, dbias) < 1e-6


def test_meta_tensors() -> None:
    x, weight = make(6, 5, 7, torch.bfloat16)
    meta = [t.to("meta") for t in (x.reshape(2, 3, 7), *weight)]
    y = pumice.ops.int8_mixed_linear(*meta)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 5), torch.bfloat16, "meta")


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("m", [3, 40])
def test_opcheck(backend: Backend, requires_grad: bool, m: int) -> None:
    x, weight = make(m, 5, 19, torch.float32)
    x, *tensors = (t.to(backend.device) for t in (x, *weight))
    x.requires_grad_(requires_grad)
    torch.library.opcheck(
        backend.ops.int8_mixed_linear.default, (x, *tensors), {"threshold": 5.0}
    )  # fmt: skip


def test_compiles_for_any_shape(backend: Backend) -> None:
    def linear(x: Tensor, *weight: Tensor) -> Tensor:
        return pumice.ops.int8_mixed_linear(x.relu(), *weight).tanh()

    compiled = backend.compile(linear)
    for m, n, k in ((3, 5, 17), (40, 4, 40), (1, 8, 5)):
        x, weight = make(m, n, k, torch.float32)
        x, *tensors = (t.to(backend.device) for t in (x, *weight))
        x.requires_grad_()
        y = compiled(x, *tensors)
        torch.testing.assert_close(y, linear(x, *tensors))
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, torch.autograd.grad(linear(x, *tensors).sum(), x)[0])


class Layer(torch.nn.Module):
    def __init__(self, weight: list[Tensor]) -> None:
        super().__init__()
        for name, tensor in zip(("qweight", "weight_scale", "bias"), weight, strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return pumice.ops.int8_mixed_linear(x, self.qweight, self.weight_scale, self.bias)


def test_exports(backend: Backend) -> None:
    x, weight = make(40, 5, 19, torch.float32)
    x, *tensors = (t.to(backend.device) for t in (x, *weight))
    layer = Layer(tensors)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    names = [str(node.target) for node in program.graph.nodes]
    assert any("int8_mixed_linear" in name for name in names)
    for m in (40, 7):
        assert torch.equal(program.module()(x[:m]), layer(x[:m]))


X = torch.ones(2, 4)
W = torch.ones(3, 4, dtype=torch.int8)


@pytest.mark.parametrize(
    ("error", "message", "replaced"),
    [
        (TypeError, "x must be float32 or float16 or bfloat16, not int8", {"x": X.to(torch.int8)}),
        (TypeError, "x must be a torch.Tensor, not NoneType", {"x": None}),
        (ValueError, "x must have shape .*, but it is a scalar", {"x": torch.tensor(1.0)}),
        (TypeError, "qweight must be int8, not float32", {"qweight": W.float()}),
        (ValueError, "last dimension of x must be K = 5", {"qweight": torch.ones(3, 5).char()}),
        (ValueError, r"weight_scale must have shape \[3\] or \[1\], not \[4\]",
         {"weight_scale": torch.ones(4)}),
        (ValueError, "weight_scale requires a gradient",
         {"weight_scale": torch.ones(3, requires_grad=True)}),
        (ValueError, r"bias must have shape \[3\], not \[2\]", {"bias": torch.ones(2)}),
        (ValueError, "threshold must be positive .*, not 0.0", {"threshold": 0.0}),
        (ValueError, "threshold must be positive .*, not nan", {"threshold": math.nan}),
        (TypeError, "threshold must be a float, not NoneType", {"threshold": None}),
        (ValueError, "qweight is on meta, but x is on cpu", {"qweight": W.to("meta")}),
        (ValueError, "131072 input features; beyond 131071",
         {"x": torch.ones(1, 2**17), "qweight": torch.ones(3, 2**17).char()}),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], message: str, replaced: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"x": X, "qweight": W, "weight_scale": torch.ones(3)}
    with pytest.raises(error, match=f"int8_mixed_linear: .*{message}"):
        pumice.ops.int8_mixed_linear(**{**arguments, **replaced})


@pytest.mark.parametrize(
    ("message", "replaced"),
    [
        ("x must be float32", {"x": X.double()}),
        ("threshold must be positive", {"threshold": -1.0}),
        ("the last dimension of the input must be K = 5", {"qweight": torch.ones(3, 5).char()}),
        ("weight_scale must be a vector of 3 elements", {"weight_scale": torch.ones(4)}),
        ("weight_scale must be float32", {"weight_scale": torch.ones(3).half()}),
    ],
)
def test_second_wall(backend: Backend, message: str, replaced: dict[str, Any]) -> None:
    """Callers of torch.ops, past the Python checks."""
    arguments: dict[str, Any] = {"x": X, "qweight": W, "weight_scale": torch.ones(3), "bias": None}
    arguments |= replaced
    moved = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"int8_mixed_linear: .*{message}"):
        backend.ops.int8_mixed_linear(**moved)
