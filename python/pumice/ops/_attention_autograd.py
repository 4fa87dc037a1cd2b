"""Shapes and gradients of the attention operators, for torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.ops import _library

# Positions of flash_attention's differentiable tensors.
_QUERY, _KEY, _VALUE, _SINKS = 0, 1, 2, 5


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *others: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    queries, heads = query.shape[-3:-1]
    leading = query.shape[:1] if cu_seqlens_q is None else ()
    return out, query.new_empty((*leading, heads, queries), dtype=torch.float32)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *others: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        lse.new_empty(lse.shape),
    )


def _setup(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor],
) -> None:
    query, key, value, *others = inputs
    ctx.save_for_backward(query, key, value, *output, *others)
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)  # grad_lse is None wherever the lse is not used


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, *others = ctx.saved_tensors
    if grad_out is None:
        if grad_lse is None:
            return (None,) * 10
        grad_out = torch.zeros_like(out)
    grad_query, grad_key, grad_value, delta = _library.ops.flash_attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, *others, **ctx.options
    )
    gradients: list[Tensor | None] = [None] * 10
    gradients[_QUERY], gradients[_KEY], gradients[_VALUE] = grad_query, grad_key, grad_value
    if ctx.needs_input_grad[_SINKS]:
        gradients[_SINKS] = _sinks_gradient(others[_SINKS - 3], lse, delta)
    return tuple(gradients)


def _sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """-Σ exp(sink - lse) · delta over all queries of a head.

    A larger sink takes weight from every key: ∂out/∂sink = -p · out and ∂lse/∂sink = p, with
    p = exp(sink - lse) its share of the softmax.
    """
    share = torch.exp(sinks[:, None] - lse)
    # A query that sees nothing, not even a sink.
    contributions = torch.where(lse == -torch.inf, 0.0, share * delta)
    return -contributions.sum(-1).reshape(-1, sinks.shape[0]).sum(0)


def _pack_fake(mask: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, queries, keys = mask.shape
    return (
        mask.new_empty((batch, heads, queries, (keys + 31) // 32), dtype=torch.int32),
        mask.new_empty((batch, heads, (queries + 63) // 64, (keys + 63) // 64), dtype=torch.uint8),
    )


def _merge_fake(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _merge_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _merge_backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    """With w[p] = exp(lses[p] - lse): ∂out/∂outs[p] = w[p], ∂out/∂lses[p] = w[p]·(outs[p] - out),
    ∂lse/∂lses[p] = w[p]."""
    outs, lses, out, lse = ctx.saved_tensors
    weights = torch.where(lses == -torch.inf, 0.0, torch.exp(lses - lse))
    rows = weights.transpose(-1, -2).unsqueeze(-1)  # [P, B, S, H, 1]
    grad = grad_out.float()
    difference = torch.where(rows == 0, 0.0, outs.float() - out.float())
    along = (difference * grad).sum(-1).transpose(-1, -2)
    return (rows * grad).to(outs.dtype), weights * (along + grad_lse)


_library.declare("flash_attention", fake=_forward_fake, backward=_backward, setup_context=_setup)
_library.declare(
    "flash_attention_backward",
    fake=_backward_fake,
    backward=_library.not_differentiable(
        "flash_attention_backward", "Attention has first derivatives only."
    ),
)
_library.declare(
    "attention_mask_pack",
    fake=_pack_fake,
    backward=_library.not_differentiable("pack_attention_mask", "A boolean mask has no gradient."),
)
_library.declare(
    "merge_attention", fake=_merge_fake, backward=_merge_backward, setup_context=_merge_setup
)
