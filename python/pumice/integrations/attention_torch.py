"""torch's own ``scaled_dot_product_attention``, computed by pumice: a provider for torch's hook.

::

    import pumice.integrations.attention_torch  # tells torch.nn.attention of "pumice"

    torch.nn.attention.activate_flash_attention_impl("pumice")
    ...                                          # F.scaled_dot_product_attention, nn.Transformer, …
    torch.nn.attention.restore_flash_attention_impl()

Activating replaces the kernels behind torch's *flash* backend, on CUDA (as torch's own providers
FA3 and FA4 do) and on the CPU. Which backend a call takes is still torch's decision: on the CPU
flash takes every floating dtype, with or without a mask; on CUDA fp16 and bf16 without a mask.
``torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION)`` asks for it.

What pumice does not compute is refused by an error, never handed back to torch: float64, dropout,
and an ``attn_mask`` that is a bias (on the CPU torch turns a boolean mask into one of 0 and -inf,
which is recognised). On CUDA this has not run on a GPU yet.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from pumice.flash_attn import _top_left
from pumice.ops import _library, pack_attention_mask
from pumice.ops._checks import FLOATING

NAME = "pumice"

try:
    from torch.nn.attention import register_flash_attention_impl
except ImportError as error:
    raise ImportError(
        f"torch {torch.__version__} has no torch.nn.attention.register_flash_attention_impl; call "
        "pumice.scaled_dot_product_attention instead"
    ) from error


class _Handle:
    """Keeps the kernels registered; torch calls remove() to have its own back."""

    def __init__(self, libraries: list[Library]) -> None:
        self.libraries = libraries

    def remove(self) -> None:
        while self.libraries:
            self.libraries.pop()._destroy()


def activate() -> _Handle:
    """Register the kernels; what ``activate_flash_attention_impl("pumice")`` calls."""
    libraries = []
    for device, kernels in (("CPU", _CPU), ("CUDA", _CUDA)):
        if device.lower() in _library.devices:
            library = Library("aten", "IMPL")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
                for name, kernel in kernels.items():
                    library.impl(name, kernel, device, allow_override=True)
            libraries.append(library)
    return _Handle(libraries)


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    _check(query, dropout_p)
    return _forward(query, key, value, is_causal, attn_mask, scale)


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad_out, query, key, value, out, logsumexp, is_causal, attn_mask, scale)


def _cuda_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    _check(query, dropout_p)
    out, lse = _forward(query, key, value, is_causal, None, scale)
    # The state of a random generator, which only dropout would use, and a mask for debugging.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    offset = torch.zeros((), dtype=torch.uint64, device=query.device)
    debug = query.new_empty(0)
    return out, lse, None, None, query.shape[2], key.shape[2], state, offset, debug


def _cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad_out, query, key, value, out, logsumexp, is_causal, None, scale)


_CPU = {
    "_scaled_dot_product_flash_attention_for_cpu": _cpu_forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
}
_CUDA = {
    "_scaled_dot_product_flash_attention": _cuda_forward,
    "_scaled_dot_product_flash_attention_backward": _cuda_backward,
}


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """out [B, H, S_q, D_v] and the natural log-sum-exp [B, H, S_q], of [B, H, S, D]."""
    operands, others, options = _arguments(query, key, value, is_causal, attn_mask, scale)
    out, lse = _library.ops.flash_attention(*operands, *others, **options)
    return out.transpose(1, 2), lse


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    operands, others, options = _arguments(query, key, value, is_causal, attn_mask, scale)
    gradients = _library.ops.flash_attention_backward(
        grad_out.transpose(1, 2),
        None,
        *operands,
        out.transpose(1, 2).contiguous(),
        lse.contiguous(),
        *others,
        **options,
    )
    grad_query, grad_key, grad_value = (g.transpose(1, 2) for g in gradients[:3])
    unseen = (0, 0, 0, key.shape[2] - grad_key.shape[2])  # keys that causality left out
    pad = torch.nn.functional.pad
    return grad_query, pad(grad_key, unseen), pad(grad_value, unseen)


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> tuple[list[Tensor], list[Tensor | None], dict[str, Any]]:
    """Of the operator: query, key, value; the optional tensors; the options."""
    right = -1
    if is_causal:
        key, value, (_, right) = _top_left(query, key, value)
    bits = blocks = None
    if attn_mask is not None:
        shape = (*attn_mask.shape[:-2], query.shape[2], key.shape[2])
        bits, blocks, _ = pack_attention_mask(_boolean(attn_mask).expand(shape))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    operands = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    others = [None, None, None, None, None, bits, blocks]
    return operands, others, {"softmax_scale": scale, "window_right": right}


def _boolean(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if not bool((visible | (mask == -torch.inf)).all()):
        raise _unsupported("attn_mask holds other values than 0 and -inf, a bias")
    return visible


def _check(query: Tensor, dropout_p: float) -> None:
    if dropout_p:
        raise _unsupported(f"dropout_p is {dropout_p}")
    if query.dtype not in FLOATING:
        raise _unsupported(f"query is {str(query.dtype)[6:]}, not float32, float16 or bfloat16")


def _unsupported(reason: str) -> RuntimeError:
    return RuntimeError(
        f"scaled_dot_product_attention by {NAME}: {reason}, which is not supported; "
        "torch.nn.attention.restore_flash_attention_impl() brings torch's own kernel back"
    )


register_flash_attention_impl(NAME, register_fn=activate)
