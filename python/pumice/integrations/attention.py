"""``attn_implementation="pumice"`` for the models of transformers.

After ``import pumice.integrations.transformers``, or :func:`register`::

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="pumice")
    model.set_attn_implementation("pumice")  # one that is loaded

Two functions are registered. :func:`attention_mask` makes the mask once for all layers, and
:func:`attention_forward` runs a layer. What the one tells the other is in the shape of the mask:

=======================  ===========================================================================
``None``                 nothing is hidden but by the layer's own causality and ``sliding_window``
``[B, S_k]``             causal, and keys that are padding are hidden from all
``[B, W, S_k]``          the same with a window of W tokens; all W rows are one (no memory)
``[B, 1, S_q, S_k]``     the whole truth: any pattern (packed sequences, chunks, prefixes, trees)
=======================  ===========================================================================

So a causal or sliding model never makes an S × S mask, padded or not; the kernels skip what lies
outside the window. Learned sinks (``s_aux``), ``softcap``, fewer heads of key and value, and a
value dim of its own are arguments of the operator. Attention dropout, probabilities
(``output_attentions``), position biases and the paged cache of transformers' continuous batching
are refused; of our own paged caches see :mod:`pumice.integrations.attention_paged`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from pumice.integrations.attention_paged import paged_cache_forward
from pumice.ops import flash_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
except ImportError as error:
    raise ImportError(
        "models of transformers need transformers >= 4.57: pip install 'pumice[hf]'"
    ) from error

NAME = "pumice"


def register() -> None:
    """Make ``attn_implementation="pumice"`` known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers calls it.

    Args:
        module: the layer; its ``is_causal`` counts where there is no mask and no argument.
        query: [B, H, S_q, D]. key, value: [B, H_kv, S_k, D] and [B, H_kv, S_k, D_v].
        attention_mask: one of the forms above; an additive float mask of 0 and -inf (or the
            smallest number) is taken as the boolean one it stands for.
        scaling: 1 / √D by default. softcap: see :func:`pumice.ops.flash_attention`.
        sliding_window: tokens, the query's own included; a causal layer looks back only.
        s_aux: [H] learned sinks.

    Returns:
        [B, S_q, H, D_v], and None in place of the probabilities.

    Raises:
        NotImplementedError: dropout, output_attentions, a position bias, transformers' paged cache.
        ValueError: a float mask that is no mask.
    """
    _refuse(dropout, kwargs)
    cache = getattr(key, "pumice_pages", None)
    query, key, value = _one_dtype(query, key, value)
    if cache is not None:
        out = paged_cache_forward(
            module, cache, query, key, value, attention_mask,
            scaling=scaling, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux,
        )  # fmt: skip
        return out, None
    window, mask = sliding_window, attention_mask
    if mask is None:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    elif mask.dim() == 4:
        mask, causal, window = _boolean(mask)[..., : key.shape[2]], False, None
    else:
        causal = True
        if mask.dim() == 3:
            window, mask = mask.shape[1], mask[:, 0]
        # A static cache is longer than what was written into it.
        key, value = key[:, :, : mask.shape[1]], value[:, :, : mask.shape[1]]
        mask = mask[:, None, None, :]
    reach = -1 if window is None else window - 1
    out = flash_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        softmax_scale=scaling,
        causal=causal,
        window=(reach, -1 if causal else reach),
        sinks=s_aux,
        softcap=softcap or 0.0,
        mask=mask,
    )
    return out, None


def attention_mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a model's layers, in the least form that says everything.

    Called by transformers, which describes the mask by a function of positions: queries stand at
    q_offset … q_offset + q_length - 1, keys at kv_offset … kv_offset + kv_length - 1. Functions
    that are causal, or causal in a sliding window, are recognised and become arguments of the
    operator; everything else is made element by element.

    Args:
        attention_mask: bool [B, tokens so far], False where padding is; or what this function
            returned, which comes back as it is.
    """
    if attention_mask is not None and attention_mask.dim() == 3:
        return attention_mask
    if q_length is None:  # transformers 4 gives the positions themselves
        cache_position: Tensor = kwargs["cache_position"]
        queries, q_offset = cache_position.shape[0], cache_position[0]
        kwargs["device"] = cache_position.device
    else:
        queries = q_length
        kwargs |= {"q_length": q_length, "q_offset": q_offset}
    elements = {
        **kwargs,
        "batch_size": batch_size,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": False,
    }
    pattern = _pattern(mask_function)
    if pattern is None:
        return _every_element(elements)
    causal, window = pattern
    if isinstance(q_offset, Tensor):
        if torch.compiler.is_compiling():
            return _every_element(elements)
        q_offset = int(q_offset)
    # Keys that exist: the operator has the last query stand at the last key.
    keys = q_offset + queries - kv_offset if causal else kv_length
    seen: Tensor | None = None
    if attention_mask is not None:
        missing = max(0, kv_offset + keys - attention_mask.shape[1])
        seen = nn.functional.pad(attention_mask, (0, missing))[:, kv_offset : kv_offset + keys]
        if not torch.compiler.is_compiling() and bool(seen.all()):
            seen = None
    if window is not None and window >= keys:
        window = None
    if not causal and seen is not None:
        # Two dimensions would mean a causal one. This has the memory of a row.
        return seen[:, None, None].expand(-1, -1, queries, -1)
    if seen is None and window is None and keys == kv_length:
        return None
    if seen is None:
        seen = torch.ones(1, keys, dtype=torch.bool, device=kwargs.get("device"))
        seen = seen.expand(batch_size, keys)
    return seen if window is None else seen[:, None].expand(-1, window, -1)


def _every_element(elements: dict[str, Any]) -> Tensor:
    mask: Tensor = masking_utils.sdpa_mask(**elements)
    return mask


def _pattern(mask_function: Callable[..., Any]) -> tuple[bool, int | None] | None:
    """Whether a mask function is causal and the tokens of its window; None if it is another.

    A window's function is known by its code, what it closes over by its name. One that a later
    version of transformers writes differently is simply not recognised, nor is any while
    torch.compile traces, which does not look into closures.
    """
    if mask_function is masking_utils.causal_mask_function:
        return True, None
    if mask_function is getattr(masking_utils, "bidirectional_mask_function", None):
        return False, None
    if torch.compiler.is_compiling():
        return None
    parts = _closed_over(mask_function, _AND_MASKS, "mask_functions")
    if parts is None or len(parts) != 2 or _pattern(parts[1]) != (True, None):
        return None
    window = _closed_over(parts[0], _SLIDING, "sliding_window")
    return (True, window) if isinstance(window, int) else None


_AND_MASKS = masking_utils.and_masks(masking_utils.causal_mask_function).__code__
_SLIDING = masking_utils.sliding_window_overlay(1).__code__


def _closed_over(function: Any, code: CodeType, name: str) -> Any:
    """What a function of that code has closed over under that name; None if it is another."""
    if getattr(function, "__code__", None) is not code or name not in code.co_freevars:
        return None
    return function.__closure__[code.co_freevars.index(name)].cell_contents


def _boolean(mask: Tensor) -> Tensor:
    """A mask [B, 1, S_q, S_k] as bool."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(
            f"{NAME} attention: a four-dimensional attention_mask must be bool, or float with 0 "
            f"and -inf, not {str(mask.dtype)[6:]}"
        )
    visible = mask == 0
    if not torch.compiler.is_compiling():
        least = torch.finfo(mask.dtype).min
        if not bool((visible | (mask <= least / 2)).all()):
            raise ValueError(
                f"{NAME} attention: attention_mask holds other values than 0 and -inf (or the "
                f"least number, {least:.3g}); a bias on the scores is not supported"
            )
    return visible


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the type of autocast where that is on, as torch's own attention does it."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise NotImplementedError(
            f"{NAME} attention: dropout = {dropout}, but attention dropout is not supported; set "
            "the model's attention_dropout (attn_pdrop, …) to 0, or call model.eval()"
        )
    for name, instead in (
        ("output_attentions", "attn_implementation='eager' makes the probabilities"),
        ("position_bias", "a bias on the scores is not supported; use 'eager' or 'sdpa'"),
        ("cache", "continuous batching with a paged cache is not supported; use model.generate"),
    ):
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise NotImplementedError(f"{NAME} attention: {name} is given, but {instead}")
