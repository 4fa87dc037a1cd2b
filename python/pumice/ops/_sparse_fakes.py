"""Shapes and gradients of the 2:4 operators, for torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.ops import _library
from pumice.ops._sparse_checks import kept_group_size, meta_bytes


def _compress_fake(w: Tensor) -> tuple[Tensor, Tensor]:
    n, k = w.shape
    return w.new_empty((n, k // 2)), w.new_empty((n, meta_bytes(k)), dtype=torch.uint8)


def _compress_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _compress_backward(ctx: Any, dvalues: Tensor, _: Any) -> Tensor:
    (meta,) = ctx.saved_tensors
    dw: Tensor = _library.ops.sparse24_decompress(dvalues.contiguous(), meta)
    return dw


def _gather_fake(w: Tensor, meta: Tensor) -> Tensor:
    return w.new_empty((w.shape[0], w.shape[1] // 2))


def _save_meta(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gather_backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor, None]:
    (meta,) = ctx.saved_tensors
    return _library.ops.sparse24_decompress(dvalues.contiguous(), meta), None


def _decompress_fake(values: Tensor, meta: Tensor) -> Tensor:
    return values.new_empty((values.shape[0], 2 * values.shape[1]))


def _decompress_backward(ctx: Any, dw: Tensor) -> tuple[Tensor, None]:
    (meta,) = ctx.saved_tensors
    return _library.ops.sparse24_gather(dw, meta), None


def _linear_fake(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, meta, bias = inputs
    needs_x, needs_values = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_values else None, values if needs_x else None, meta)
    ctx.x_shape = x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype


def _bias_gradient(ctx: Any, rows: Tensor) -> Tensor:
    return rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, meta = ctx.saved_tensors
    needs_x, needs_values, _, needs_bias = ctx.needs_input_grad
    rows = dy.reshape(-1, dy.shape[-1])
    dx = dvalues = None
    if needs_x:
        weight = _library.ops.sparse24_decompress(values, meta)
        dx = rows.matmul(weight).reshape(ctx.x_shape)
    if needs_values:
        dw = rows.T.matmul(x.reshape(-1, x.shape[-1]))
        dvalues = _library.ops.sparse24_gather(dw, meta)
    return dx, dvalues, None, _bias_gradient(ctx, rows) if needs_bias else None


def _int8_linear_fake(
    q: Tensor,
    scale: Tensor,
    values: Tensor,
    meta: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((*q.shape[:-1], values.shape[0]), dtype=out_dtype)


def _int4_linear_fake(
    x: Tensor,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    *,
    group_size: int,
    bits: int = 4,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], qvalues.shape[0]))


def _int4_linear_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    x, qvalues, meta, scales, zeros, bias = inputs
    ctx.save_for_backward(qvalues, meta, scales, zeros)
    ctx.x_shape = x.shape
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.group_size = keyword_only_inputs["group_size"]
    ctx.bits = keyword_only_inputs.get("bits", 4)


def _int4_linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    qvalues, meta, scales, zeros = ctx.saved_tensors
    rows = dy.reshape(-1, dy.shape[-1])
    dx = None
    if ctx.needs_input_grad[0]:
        kept, group_size = ctx.x_shape[-1] // 2, kept_group_size(ctx.group_size)
        values = _library.ops.int4_dequantize(
            qvalues, scales, zeros, None, kept, group_size, ctx.bits, out_dtype=ctx.x_dtype
        )
        weight = _library.ops.sparse24_decompress(values, meta)
        dx = rows.matmul(weight).reshape(ctx.x_shape)
    dbias = _bias_gradient(ctx, rows) if ctx.needs_input_grad[5] else None
    return dx, None, None, None, None, dbias


_library.declare(
    "sparse24_compress",
    fake=_compress_fake,
    backward=_compress_backward,
    setup_context=_compress_setup,
)
_library.declare(
    "sparse24_gather", fake=_gather_fake, backward=_gather_backward, setup_context=_save_meta
)
_library.declare(
    "sparse24_decompress",
    fake=_decompress_fake,
    backward=_decompress_backward,
    setup_context=_save_meta,
)
_library.declare(
    "sparse24_linear", fake=_linear_fake, backward=_linear_backward, setup_context=_linear_setup
)
_library.declare(
    "sparse24_int8_linear",
    fake=_int8_linear_fake,
    backward=_library.not_differentiable(
        "sparse24_int8_linear", "Quantized weights are frozen; sparse24_linear has gradients."
    ),
)
_library.declare(
    "sparse24_int4_linear",
    fake=_int4_linear_fake,
    backward=_int4_linear_backward,
    setup_context=_int4_linear_setup,
)
