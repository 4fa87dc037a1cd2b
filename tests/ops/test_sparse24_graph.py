"""The 2:4 operators under autograd, torch.compile and export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pumice
from backends import Backend
from sparse24_cases import SparseCase, moved, prune


def floating(backend: Backend, **shape: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    case = SparseCase(**{"m": 6, "n": 6, "quads": 10, "dtype": torch.bfloat16, **shape},
                      bias_dtype=torch.float32)  # fmt: skip
    t = moved(case.floating(), backend.device)
    values, meta = pumice.ops.sparse24_compress(t["w"])
    return t["x"], values, meta, t["bias"]


def integers(backend: Backend, **shape: Any) -> tuple[Tensor | None, ...]:
    case = SparseCase(**{"m": 6, "n": 6, "quads": 10, **shape}, bias_dtype=torch.float32)
    t = moved(case.integers(), backend.device)
    values, meta = pumice.ops.sparse24_compress(t["w"])
    return t["q"], t["scale"], values, meta, t["weight_scale"], t["bias"]


def packed(backend: Backend, **shape: Any) -> tuple[Tensor | None, ...]:
    case = SparseCase(**{"m": 6, "n": 6, "quads": 10, "zeros": "integer", **shape},
                      bias_dtype=torch.float32)  # fmt: skip
    t = moved(case.packed(), backend.device)
    qvalues = pumice.ops.int4_pack(t["q"], case.bits)
    return t["x"], qvalues, t["meta"], t["scales"], t["zeros"], t["bias"]


@pytest.mark.parametrize("m", [2, 6])
def test_gradients(backend: Backend, m: int) -> None:
    """Of x, values and bias: those of the dense product, the values' at the kept places."""
    gradients = []
    for dense in (False, True):
        x, values, meta, bias = floating(backend, m=2 * m, dtype=torch.float16)
        leaves = [t.clone().requires_grad_() for t in (x, values, bias)]
        rows = leaves[0].reshape(2, m, -1)
        if dense:
            w = pumice.ops.sparse24_decompress(leaves[1], meta)
            y = torch.nn.functional.linear(rows.float(), w.float(), leaves[2]).half()
        else:
            y = pumice.ops.sparse24_linear(rows, leaves[1], meta, leaves[2])
        assert y.shape == (2, m, 6)
        (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*gradients, strict=True):
        assert actual is not None
        assert expected is not None
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert (actual - expected).abs().max() <= 4e-3 * expected.abs().max()


def test_weights_gradients_are_each_others_transposes(backend: Backend) -> None:
    g = torch.Generator().manual_seed(0)
    w = prune(torch.randn(5, 24, generator=g), g).to(backend.device)
    values, meta = pumice.ops.sparse24_compress(w)
    grads = torch.randn(5, 12, generator=g).to(backend.device)
    dense = torch.randn(5, 24, generator=g).to(backend.device)
    spread = pumice.ops.sparse24_decompress(grads, meta)
    leaf = w.clone().requires_grad_()
    pumice.ops.sparse24_compress(leaf)[0].backward(grads)
    assert torch.equal(leaf.grad, spread)
    leaf = dense.clone().requires_grad_()
    pumice.ops.sparse24_gather(leaf, meta).backward(grads)
    assert torch.equal(leaf.grad, spread)
    leaf = values.clone().requires_grad_()
    pumice.ops.sparse24_decompress(leaf, meta).backward(dense)
    assert torch.equal(leaf.grad, pumice.ops.sparse24_gather(dense, meta))


def test_packed_gradients(backend: Backend) -> None:
    x, qvalues, meta, scales, zeros, bias = packed(backend)
    assert x is not None
    assert bias is not None
    x, bias = x.requires_grad_(), bias.requires_grad_()
    y = pumice.ops.sparse24_int4_linear(x, qvalues, meta, scales, zeros, bias, group_size=64)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y.dtype)
    y.backward(dy)
    kept = pumice.ops.int4_dequantize(
        qvalues, scales, zeros, k=20, group_size=32, out_dtype=torch.float32
    )
    expected = dy.float() @ pumice.ops.sparse24_decompress(kept, meta)
    assert (x.grad.float() - expected).abs().max() <= 1e-2 * expected.abs().max()
    torch.testing.assert_close(bias.grad, dy.float().sum(0), rtol=1e-2, atol=1e-2)


def test_int8_is_not_differentiable(backend: Backend) -> None:
    q, scale, values, meta, weight_scale, bias = integers(backend)
    assert bias is not None
    y = pumice.ops.sparse24_int8_linear(
        q, scale, values, meta, weight_scale, bias.requires_grad_(), out_dtype=torch.float32
    )
    with pytest.raises(RuntimeError, match="sparse24_int8_linear is not differentiable"):
        y.sum().backward()


def test_opcheck(backend: Backend) -> None:
    x, values, meta, bias = floating(backend)
    leaves = (x.requires_grad_(), values.requires_grad_(), meta, bias.requires_grad_())
    torch.library.opcheck(backend.ops.sparse24_linear.default, leaves)
    w = pumice.ops.sparse24_decompress(values.detach(), meta)
    torch.library.opcheck(backend.ops.sparse24_compress.default, (w.clone().requires_grad_(),))
    torch.library.opcheck(backend.ops.sparse24_gather.default, (w.requires_grad_(), meta))
    torch.library.opcheck(backend.ops.sparse24_decompress.default, (values, meta))
    torch.library.opcheck(
        backend.ops.sparse24_int8_linear.default, integers(backend), {"out_dtype": torch.float16}
    )
    tensors = packed(backend)
    assert tensors[0] is not None
    torch.library.opcheck(
        backend.ops.sparse24_int4_linear.default,
        (tensors[0].requires_grad_(), *tensors[1:]),
        {"group_size": 64},
    )


def test_compiles_for_any_shape(backend: Backend) -> None:
    def float_layer(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor) -> Tensor:
        return pumice.ops.sparse24_linear(x, values, meta, bias) + 1

    def int8_layer(*tensors: Tensor) -> Tensor:
        return pumice.ops.sparse24_int8_linear(*tensors, out_dtype=torch.float16) + 1

    def int4_layer(*tensors: Tensor) -> Tensor:
        return pumice.ops.sparse24_int4_linear(*tensors, group_size=64) + 1

    for function, make in (
        (float_layer, floating),
        (int8_layer, integers),
        (int4_layer, packed),
    ):
        compiled = backend.compile(function)
        for m, n, quads in ((3, 5, 12), (9, 4, 20), (2, 8, 33)):
            given = make(backend, m=m, n=n, quads=quads)
            assert torch.equal(compiled(*given), function(*given))  # type: ignore[operator]


def test_compression_compiles(backend: Backend) -> None:
    def function(w: Tensor) -> Tensor:
        values, meta = pumice.ops.sparse24_compress(w)
        return pumice.ops.sparse24_decompress(values * 2, meta) + pumice.ops.sparse24_decompress(
            pumice.ops.sparse24_gather(w, meta), meta
        )

    compiled = backend.compile(function)
    g = torch.Generator().manual_seed(0)
    for n, k in ((3, 8), (5, 40), (8, 64)):
        w = prune(torch.randn(n, k, generator=g), g).to(backend.device)
        torch.testing.assert_close(compiled(w), 3 * w)


def test_training_compiles(backend: Backend) -> None:
    """Fine-tuning under a fixed mask, as PruneAndTune does it."""

    def function(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor) -> Tensor:
        return pumice.ops.sparse24_linear(x, values, meta, bias)

    gradients = []
    for run in (function, backend.compile(function)):
        x, values, meta, bias = floating(backend)
        leaf = values.clone().requires_grad_()
        run(x, leaf, meta, bias).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


class Layer(torch.nn.Module):
    def __init__(self, values: Tensor, meta: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("metadata", meta)  # a graph has a "meta" of its own

    def forward(self, x: Tensor) -> Tensor:
        return pumice.ops.sparse24_linear(x, self.values, self.metadata)


def test_export(backend: Backend) -> None:
    x, values, meta, _ = floating(backend)
    layer = Layer(values, meta)
    rows = torch.export.Dim("rows", min=1, max=4096)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    for m in (1, 7):
        x = torch.randn(m, 40, device=backend.device).bfloat16()
        assert torch.equal(exported.module()(x), layer(x))


def test_meta_tensors() -> None:
    w = torch.empty(6, 40, device="meta", dtype=torch.float16)
    values, meta = pumice.ops.sparse24_compress(w)
    assert (values.shape, values.dtype, meta.shape) == ((6, 20), torch.float16, (6, 8))
    x = torch.empty(2, 3, 40, device="meta", dtype=torch.float16)
    y = pumice.ops.sparse24_linear(x, values, meta)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 6), torch.float16, "meta")
