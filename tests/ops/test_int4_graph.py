"""int4_linear under autograd, torch.compile and export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pumice
from backends import Backend
from int4_cases import Int4Case

FULL = Int4Case(m=5, n=6, k=40, group_size=16, zeros="integer", order="perm", outliers=2, rank=3,
                bias_dtype=torch.float32)  # fmt: skip
SYMMETRIC = Int4Case(m=5, n=6, k=40, group_size=16)
NAMES = ("x", "qweight", "scales", "zeros", "g_idx", "perm", "bias", "outlier_idx",
         "outlier_weight", "lora_a", "lora_b")  # fmt: skip


def arguments(backend: Backend, case: Int4Case) -> dict[str, Tensor | None]:
    tensors = {k: t if t is None else t.to(backend.device) for k, t in case.tensors().items()}
    tensors["qweight"] = pumice.ops.int4_pack(tensors.pop("q"), case.bits)
    return {name: tensors[name] for name in NAMES}


def plain(backend: Backend, case: Int4Case, a: dict[str, Any]) -> Tensor:
    """The definition, in torch operators that autograd knows."""
    weight = pumice.ops.int4_dequantize(
        a["qweight"], a["scales"], a["zeros"], a["g_idx"], k=case.k, group_size=case.group_size,
        bits=case.bits, out_dtype=torch.float32,
    )  # fmt: skip
    x = a["x"].float()
    y = (x if a["perm"] is None else x[..., a["perm"].long()]) @ weight.T
    if a["bias"] is not None:
        y = y + a["bias"].float()
    if a["outlier_idx"] is not None:
        y = y + x[..., a["outlier_idx"].long()] @ a["outlier_weight"].float().T
    if a["lora_a"] is not None:
        y = y + (x @ a["lora_a"].float().T) @ a["lora_b"].float().T
    return y.to(a["x"].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["natural", "perm", "g_idx"])
def test_gradients(backend: Backend, order: str, dtype: torch.dtype) -> None:
    case = Int4Case(m=6, n=6, k=40, group_size=16, zeros="float", order=order, outliers=2, rank=3,
                    bias_dtype=dtype, dtype=dtype)  # fmt: skip
    wanted = ("x", "bias", "outlier_weight", "lora_a", "lora_b")
    gradients = []
    for function in (
        lambda a: pumice.ops.int4_linear(**a, group_size=case.group_size),
        lambda a: plain(backend, case, a),
    ):
        tensors = arguments(backend, case)
        leaves = {k: tensors[k].clone().requires_grad_() for k in wanted}  # type: ignore[union-attr]
        rows = {**tensors, **leaves, "x": leaves["x"].reshape(2, 3, case.k)}
        y = function(rows)
        assert y.shape == (2, 3, case.n)
        (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
        gradients.append({k: leaf.grad for k, leaf in leaves.items()})
    for name in wanted:
        actual, expected = gradients[0][name], gradients[1][name]
        assert actual is not None
        assert actual.dtype == expected.dtype
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        scale = float(expected.float().abs().max())
        assert (actual - expected).float().abs().max() <= tolerance * scale, name


def test_only_the_wanted_gradients(backend: Backend) -> None:
    tensors = arguments(backend, FULL)
    tensors["bias"] = tensors["bias"].clone().requires_grad_()  # type: ignore[union-attr]
    y = pumice.ops.int4_linear(**tensors, group_size=16)
    y.sum().backward()
    assert torch.equal(tensors["bias"].grad.cpu(), torch.full((6,), 5.0))


def test_int8_activation_is_straight_through() -> None:
    case = Int4Case(m=3, n=6, k=40, group_size=16)
    tensors = case.tensors()
    qweight = pumice.ops.int4_pack(tensors["q"])
    x = tensors["x"].requires_grad_()
    pumice.ops.int4_linear(
        x, qweight, tensors["scales"], group_size=16, int8_activation=True
    ).sum().backward()
    weight = pumice.ops.int4_dequantize(
        qweight, tensors["scales"], k=40, group_size=16, out_dtype=torch.float32
    )
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("name", ["int4_pack", "int4_unpack", "int4_dequantize"])
@pytest.mark.parametrize("bits", [3, 4])
def test_opcheck_weight(backend: Backend, name: str, bits: int) -> None:
    case = Int4Case(n=3, k=37, bits=bits, group_size=16, zeros="integer")
    tensors = {k: t if t is None else t.to(backend.device) for k, t in case.tensors().items()}
    qweight = pumice.ops.int4_pack(tensors["q"], bits)
    scales, zeros = tensors["scales"], tensors["zeros"]
    positional, keywords = {
        "int4_pack": ((tensors["q"], bits), {}),
        "int4_unpack": ((qweight, 37, bits), {}),
        "int4_dequantize": (
            (qweight, scales, zeros, None, 37, 16, bits),
            {"out_dtype": torch.float16},
        ),
    }[name]
    torch.library.opcheck(getattr(backend.ops, name).default, positional, keywords)


@pytest.mark.parametrize("case", [FULL, SYMMETRIC])
def test_opcheck(backend: Backend, case: Int4Case) -> None:
    tensors = arguments(backend, case)
    for name in ("x", "bias", "outlier_weight", "lora_a", "lora_b"):
        if tensors[name] is not None:
            tensors[name] = tensors[name].clone().requires_grad_()  # type: ignore[union-attr]
    torch.library.opcheck(
        backend.ops.int4_linear.default, tuple(tensors.values()), {"group_size": case.group_size}
    )


def test_compiles_for_any_shape(backend: Backend) -> None:
    def function(x: Tensor, qweight: Tensor, scales: Tensor) -> Tensor:
        return pumice.ops.int4_linear(x, qweight, scales, group_size=16) + 1

    compiled = backend.compile(function)
    for m, n, k in ((3, 5, 48), (9, 4, 80), (2, 8, 33)):
        tensors = arguments(backend, Int4Case(m=m, n=n, k=k, group_size=16))
        given = (tensors["x"], tensors["qweight"], tensors["scales"])
        assert torch.equal(compiled(*given), function(*given))  # type: ignore[arg-type]


def test_gradients_compile(backend: Backend) -> None:
    def function(**tensors: Any) -> Tensor:
        return pumice.ops.int4_linear(**tensors, group_size=16)

    compiled = backend.compile(function)
    gradients = []
    for run in (function, compiled):
        tensors = arguments(backend, FULL)
        leaf = tensors["x"].clone().requires_grad_()  # type: ignore[union-attr]
        run(**{**tensors, "x": leaf}).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


class Layer(torch.nn.Module):
    def __init__(self, tensors: dict[str, Tensor | None]) -> None:
        super().__init__()
        for name in NAMES[1:]:
            self.register_buffer(name, tensors[name])

    def forward(self, x: Tensor) -> Tensor:
        return pumice.ops.int4_linear(
            x, **{name: getattr(self, name) for name in NAMES[1:]}, group_size=16
        )


def test_export(backend: Backend) -> None:
    tensors = arguments(backend, FULL)
    layer = Layer(tensors)
    rows = torch.export.Dim("rows", min=1, max=4096)
    exported = torch.export.export(layer, (tensors["x"],), dynamic_shapes=({0: rows},))
    for m in (1, 7):
        x = torch.randn(m, FULL.k, device=backend.device)
        assert torch.equal(exported.module()(x), layer(x))


def test_meta_tensors() -> None:
    tensors = FULL.tensors()
    qweight = pumice.ops.int4_pack(tensors.pop("q"))
    meta = {k: t if t is None else t.to("meta") for k, t in {**tensors, "qweight": qweight}.items()}
    meta["x"] = torch.empty(2, 3, FULL.k, device="meta", dtype=torch.float16)
    y = pumice.ops.int4_linear(**meta, group_size=16)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 6), torch.float16, "meta")
