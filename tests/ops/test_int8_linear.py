"""int8_linear: an exact integer product, dequantized in float32 and rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pumice
import reference
from backends import Backend
from cases import FLOATS, Case, cases, surrounded


def run(backend: Backend, *tensors: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    moved = [t if t is None else t.to(backend.device) for t in tensors]
    return pumice.ops.int8_linear(*moved, out_dtype=out_dtype)


def check(backend: Backend, *tensors: Tensor | None, out_dtype: torch.dtype) -> None:
    y = run(backend, *tensors, out_dtype=out_dtype)
    q, _, qweight, *_ = tensors
    assert y.dtype == out_dtype
    assert y.shape == (*q.shape[:-1], qweight.shape[0])
    assert y.is_contiguous()
    reference.assert_rounded(y, *reference.linear(*tensors))


def inputs(case: Case) -> tuple[Tensor | None, ...]:
    return *case.quantized(), *case.weight()


def test_exact(backend: Backend) -> None:
    @backend.for_all(cases(backend.largest))
    def check_case(case: Case) -> None:
        check(backend, *inputs(case), out_dtype=case.dtype)


@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_values(backend: Backend, sign: int) -> None:
    """-128 · -128 everywhere: what saturates 16-bit intermediates, and 8-bit absolute values."""
    for k in (1, 31, 64, 130):
        q = torch.full((33, k), -128, dtype=torch.int8)
        qweight = torch.full((9, k), -128 if sign > 0 else 127, dtype=torch.int8)
        tensors = (q, torch.ones(1), qweight, torch.ones(1), None)
        check(backend, *tensors, out_dtype=torch.float32)


@pytest.mark.parametrize("m", [1, 2, 33])
def test_one_scale_for_all_rows(backend: Backend, m: int) -> None:
    q, _, qweight, weight_scale, bias = inputs(Case(m, 20, 50, *FLOATS[:2], True, 0.0, 1))
    check(backend, q, torch.tensor([0.03]), qweight, weight_scale, bias, out_dtype=torch.float16)


@pytest.mark.parametrize("bias_dtype", [None, *FLOATS])
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_dtypes(backend: Backend, bias_dtype: Any, out_dtype: torch.dtype) -> None:
    check(backend, *inputs(Case(5, 37, 70, out_dtype, bias_dtype, True, 0.0, 2)),
          out_dtype=out_dtype)  # fmt: skip


@pytest.mark.parametrize("out_dtype", FLOATS)
def test_output_rounding(backend: Backend, out_dtype: torch.dtype) -> None:
    """y = 1 · scale · 1: floats of every magnitude, rounded to nearest even like torch does."""
    m = 300 if backend.name == "emulated" else 50_000
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (m,), generator=g)
    near = torch.arange(0x3800, 0x3800 + 128) << 16  # around the smallest normal float16
    ties = torch.arange(128) * 0x11000 + 0x3F808000  # halfway between two bfloat16
    bits[:256] = torch.cat([near, ties])
    scale = bits.to(torch.int32).view(torch.float32)
    scale = scale.where(scale.isfinite(), 1.0)
    one = torch.ones(1, 1, dtype=torch.int8)
    weight = (one, torch.ones(1), None)
    y = run(backend, one.expand(m, 1), scale, *weight, out_dtype=out_dtype)
    assert torch.equal(y[:, 0].cpu(), scale.to(out_dtype))


@pytest.mark.parametrize("shape", [(7,), (3, 2, 7), (2, 0, 7), (0, 7), (1, 1, 1, 7)])
def test_any_rank(backend: Backend, shape: tuple[int, ...]) -> None:
    q = torch.arange(torch.Size(shape).numel()).reshape(shape).to(torch.int8)
    scale = torch.linspace(0.1, 1, torch.Size(shape[:-1]).numel()).reshape(shape[:-1])
    _, _, qweight, weight_scale, bias = inputs(Case(1, 6, 7, *FLOATS[:2], True, 0.0, 3))
    check(backend, q, scale, qweight, weight_scale, bias, out_dtype=torch.float32)


def test_strides(backend: Backend) -> None:
    q, scale, qweight, weight_scale, bias = inputs(Case(8, 12, 20, *FLOATS[:2], True, 0.0, 4))
    expected = run(backend, q, scale, qweight, weight_scale, bias, out_dtype=torch.float32)
    spread = [torch.stack([t, t], dim=-1)[..., 0] for t in (q, scale, qweight, weight_scale, bias)]
    spread[0] = q.t().contiguous().t()
    actual = run(backend, *spread, out_dtype=torch.float32)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("before", [1, 16])
def test_reads_nothing_beyond(backend: Backend, before: int) -> None:
    for m, n, k in ((3, 5, 67), (34, 17, 33)):
        tensors = inputs(Case(m, n, k, torch.float32, torch.bfloat16, True, 0.0, 5))
        expected = run(backend, *tensors, out_dtype=torch.float32)
        inside = [surrounded(t.to(backend.device), before) for t in tensors]
        assert torch.equal(run(backend, *inside, out_dtype=torch.float32), expected)


def test_broken_row_stays_alone(backend: Backend) -> None:
    q, scale, qweight, weight_scale, bias = inputs(Case(40, 9, 30, *FLOATS[:2], True, 0.0, 6))
    expected = run(backend, q, scale, qweight, weight_scale, bias, out_dtype=torch.float32)
    scale = scale.clone()
    scale[5] = float("nan")
    y = run(backend, q, scale, qweight, weight_scale, bias, out_dtype=torch.float32)
    assert y[5].isnan().all()
    others = [i for i in range(40) if i != 5]
    assert torch.equal(y[others], expected[others])


def test_repeats_its_bits(backend: Backend) -> None:
    tensors = inputs(Case(40, 50, 130, torch.float32, torch.float32, True, 0.0, 7))
    first = run(backend, *tensors, out_dtype=torch.float16)
    for _ in range(3):
        assert torch.equal(run(backend, *tensors, out_dtype=torch.float16), first)


def test_meta_tensors() -> None:
    tensors = inputs(Case(6, 5, 7, torch.float32, torch.float32, True, 0.0, 8))
    meta = [t.to("meta") for t in tensors]
    meta[0], meta[1] = meta[0].view(2, 3, 7), meta[1].view(2, 3)
    y = pumice.ops.int8_linear(*meta, out_dtype=torch.bfloat16)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 5), torch.bfloat16, "meta")


@pytest.mark.parametrize("bias_dtype", [None, torch.float16])
def test_opcheck(backend: Backend, bias_dtype: Any) -> None:
    tensors = inputs(Case(6, 5, 19, torch.float32, bias_dtype, True, 0.0, 9))
    moved = tuple(t if t is None else t.to(backend.device) for t in tensors)
    torch.library.opcheck(backend.ops.int8_linear.default, moved, {"out_dtype": torch.float32})


def test_compiles_for_any_shape(backend: Backend) -> None:
    """Quantization and product in one graph."""

    def linear(x: Tensor, qweight: Tensor, weight_scale: Tensor) -> Tensor:
        q, scale, _ = pumice.ops.int8_quantize(x)
        return pumice.ops.int8_linear(q, scale, qweight, weight_scale, out_dtype=x.dtype) + 1

    compiled = backend.compile(linear)
    for m, n, k in ((3, 5, 17), (9, 4, 40), (1, 8, 5)):
        case = Case(m, n, k, torch.float32, None, True, 0.0, 10)
        qweight, weight_scale, _ = (t if t is None else t.to(backend.device) for t in case.weight())
        x = case.activations().to(backend.device)
        expected = linear(x, qweight, weight_scale)
        assert torch.equal(compiled(x, qweight, weight_scale), expected)


Q = torch.ones(2, 4, dtype=torch.int8)
W = torch.ones(3, 4, dtype=torch.int8)
S = torch.ones(2)


@pytest.mark.parametrize(
    ("error", "message", "replaced"),
    [
        (TypeError, "q must be int8, not float32", {"q": Q.float()}),
        (ValueError, "scale must hold one element or one for each row", {"scale": torch.ones(3)}),
        (TypeError, "scale must be float32, not float64", {"scale": S.double()}),
        (TypeError, "qweight must be int8, not uint8", {"qweight": W.to(torch.uint8)}),
        (ValueError, "qweight must have shape .*, not \\[4\\]", {"qweight": W[0]}),
        (ValueError, "qweight must have shape", {"qweight": W[:0]}),
        (ValueError, "last dimension of q must be K = 5", {"qweight": torch.ones(3, 5).char()}),
        (ValueError, r"weight_scale must have shape \[3\] or \[1\], not \[2\]",
         {"weight_scale": torch.ones(2)}),
        (TypeError, "weight_scale must be float32", {"weight_scale": torch.ones(3).half()}),
        (ValueError, r"bias must have shape \[3\]", {"bias": torch.ones(1)}),
        (TypeError, "bias must be float32 or float16 or bfloat16", {"bias": torch.ones(3).int()}),
        (TypeError, "out_dtype must be .*, not torch.float64", {"out_dtype": torch.float64}),
        (ValueError, "qweight is on meta, but q is on cpu", {"qweight": W.to("meta")}),
        (ValueError, "scale is on meta", {"scale": S.to("meta")}),
        (ValueError, "bias is on meta", {"bias": torch.ones(3, device="meta")}),
        (ValueError, "131072 input features; beyond 131071",
         {"q": torch.ones(1, 2**17).char(), "scale": torch.ones(1),
              "qweight": torch.ones(3, 2**17).char()}),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], message: str, replaced: dict[str, Any]) -> None:
    arguments = {"q": Q, "scale": S, "qweight": W, "weight_scale": torch.ones(3), "bias": None}
    with pytest.raises(error, match=f"int8_linear: .*{message}"):
        pumice.ops.int8_linear(**{"out_dtype": torch.float32, **arguments, **replaced})


@pytest.mark.parametrize(
    ("message", "replaced"),
    [
        ("q must be int8", {"q": Q.float()}),
        ("scale must hold 1 or M = 2 elements, not 3", {"scale": torch.ones(3)}),
        ("qweight must be an int8 matrix", {"qweight": W.float()}),
        ("the last dimension of the input must be K = 5", {"qweight": torch.ones(3, 5).char()}),
        ("weight_scale must be a vector of 3 elements", {"weight_scale": torch.ones(2)}),
        ("bias must be a vector of 3 elements", {"bias": torch.ones(2)}),
        ("out_dtype must be", {"out_dtype": torch.float64}),
    ],
)
def test_second_wall(backend: Backend, message: str, replaced: dict[str, Any]) -> None:
    """Callers of torch.ops, past the Python checks."""
    arguments: dict[str, Any] = {
        "q": Q,
        "scale": S,
        "qweight": W,
        "weight_scale": torch.ones(3),
        "bias": None,
    }
    arguments |= {"out_dtype": torch.float32} | replaced
    moved = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"int8_linear: .*{message}"):
        backend.ops.int8_linear(**moved)
