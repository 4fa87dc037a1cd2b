"""int4_linear around the number of tokens from which CUDA leaves the product to torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import pumice
from backends import Backend
from int4_cases import DEQUANTIZE_FROM, Int4Case, check, dequantize

HALVES = (torch.float16, torch.bfloat16)
FULL = Int4Case(m=DEQUANTIZE_FROM, n=20, k=75, group_size=32, zeros="integer", order="perm",
                bias_dtype=torch.float32, outliers=5, rank=9)  # fmt: skip


@pytest.mark.parametrize("m", [DEQUANTIZE_FROM - 1, DEQUANTIZE_FROM, DEQUANTIZE_FROM + 1])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_both_sides(backend: Backend, m: int, dtype: torch.dtype) -> None:
    if backend.name == "emulated" and not (m >= DEQUANTIZE_FROM and dtype != torch.float32):
        check(backend, Int4Case(m=m, n=3, k=32, group_size=16, dtype=dtype))
        return
    check(backend, Int4Case(m=m, n=24, k=160, group_size=32, dtype=dtype))
    check(backend, replace(FULL, m=m, dtype=dtype))


def test_a_weight_in_parts(backend: Backend) -> None:
    """Longer than what is written out at once on the emulated device: three parts."""
    check(backend, replace(FULL, n=600, k=505, zeros="float", dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "change",
    [
        {"order": "g_idx"},
        {"order": "both", "zeros": "float"},
        {"order": "natural", "outliers": 0, "rank": 0, "bias_dtype": None},  # but K is odd
        {"order": "natural", "outliers": 0, "rank": 0, "bias_dtype": None, "k": 80},
        {"order": "perm", "outliers": 0, "rank": 0, "bias_dtype": None, "k": 80},
        {"bias_dtype": torch.bfloat16, "outliers": 0, "rank": 0},
        {"bits": 3, "bias_dtype": None},
        {"bits": 8, "rank": 0},
        {"bits": 2, "outliers": 0, "group_size": -1},
        {"zeros": None, "n": 1, "k": 1, "outliers": 1, "rank": 1},
        {"scale_dtype": torch.float16, "n": 259},
    ],
)
@pytest.mark.parametrize("dtype", HALVES)
def test_options(backend: Backend, change: dict[str, object], dtype: torch.dtype) -> None:
    check(backend, replace(FULL, dtype=dtype, **change))  # type: ignore[arg-type]


def test_rows_of_x_off_their_boundaries(backend: Backend) -> None:
    """A view whose data does not begin on 16 bytes."""
    case = Int4Case(m=DEQUANTIZE_FROM, n=8, k=64, dtype=torch.bfloat16)
    tensors = case.tensors()
    expected = case.run(backend, tensors)
    x = torch.zeros(case.m * case.k + 1, dtype=case.dtype, device=backend.device)
    x[1:] = tensors["x"].flatten()
    tensors["x"] = x[1:].view(case.m, case.k)
    torch.testing.assert_close(case.run(backend, tensors), expected)


def test_repeats_its_bits(backend: Backend) -> None:
    case = replace(FULL, dtype=torch.bfloat16)
    tensors = case.tensors()
    first = case.run(backend, tensors)
    assert torch.equal(case.run(backend, tensors), first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_row_stays_alone(backend: Backend, bad: float) -> None:
    case = replace(FULL, dtype=torch.float16, outliers=0, rank=0)
    tensors = case.tensors()
    expected = case.run(backend, tensors)
    tensors["x"][1, 40] = bad
    y = case.run(backend, tensors)
    weight, _ = dequantize(case, tensors)
    column = int((tensors["perm"] == 40).nonzero())
    assert not y[1].cpu()[torch.from_numpy(weight[:, column] != 0)].isfinite().any()
    others = [i for i in range(case.m) if i != 1]
    assert torch.equal(y[others], expected[others])


def test_under_autocast(backend: Backend) -> None:
    """The dtype of y is that of x, whatever autocast would make of a product."""
    case = replace(FULL, dtype=torch.float16)
    tensors = case.tensors()
    expected = case.run(backend, tensors)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert torch.equal(case.run(backend, tensors), expected)


def test_gradient_flows(backend: Backend) -> None:
    case = Int4Case(m=DEQUANTIZE_FROM, n=8, k=32, group_size=16, dtype=torch.bfloat16)
    tensors = case.tensors()
    tensors["x"].requires_grad_()
    case.run(backend, tensors).sum().backward()
    weight, _ = dequantize(case, tensors)
    expected = torch.from_numpy(weight.sum(0)).expand(case.m, -1)
    assert (tensors["x"].grad.double() - expected).abs().max() <= 2**-5 * abs(weight).sum(0).max()


def test_opcheck(backend: Backend) -> None:
    case = replace(FULL, dtype=torch.bfloat16)
    tensors = {k: t if t is None else t.to(backend.device) for k, t in case.tensors().items()}
    tensors["qweight"] = pumice.ops.int4_pack(tensors.pop("q"))
    tensors["x"].requires_grad_()
    names = ("x", "qweight", "scales", "zeros", "g_idx", "perm", "bias", "outlier_idx",
             "outlier_weight", "lora_a", "lora_b")  # fmt: skip
    positional = tuple(tensors[name] for name in names)
    torch.library.opcheck(backend.ops.int4_linear.default, positional, {"group_size": 32})


def test_in_inference_mode(backend: Backend) -> None:
    case = replace(FULL, dtype=torch.bfloat16)
    tensors = case.tensors()
    expected = case.run(backend, tensors)
    with torch.inference_mode():
        assert torch.equal(case.run(backend, tensors), expected)
