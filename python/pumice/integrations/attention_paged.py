"""Models of transformers over our paged caches, in two ways.

*A packed batch* (:func:`forward`): T tokens of many sequences stand in one row without padding.
For the time of the call the model's attention implementation is "pumice_paged", which leaves each
layer's attention to the :class:`~pumice.decode.PagedBatch`: that knows what belongs together, so no
mask is made. It comes by a context variable, for not all models hand keyword arguments that they do
not know down to their layers.

*transformers' own generate* over a :class:`~pumice.decode.paged_cache.PagedCache`, under "pumice":
the keys that the cache hands to a layer's attention are marked with the cache they are from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pumice.decode.batch import PagedBatch
    from pumice.decode.paged_cache import PagedCache

NAME = "pumice_paged"

_running: ContextVar[PagedBatch] = ContextVar("running batch")

_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}


def packed_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer of a packed batch: query [1, H, T, D], key, value [1, H_kv, T, …] → [1, T, H, D_v].

    Raises:
        NotImplementedError: a layer that is not causal, or does not say which it is.
    """
    layer_idx = _self_attention(module, query, key)
    if query.shape[0] != 1:
        raise NotImplementedError(
            f"{type(module).__name__}: a paged batch is one row of tokens, but query has shape "
            f"{list(query.shape)}"
        )
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    options = _options(scaling, sliding_window, softcap, s_aux)
    return _running.get().attend(layer_idx, *packed, **options)[None], None


def paged_cache_forward(
    module: nn.Module,
    cache: PagedCache,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> Tensor:
    """One layer over a :class:`~pumice.decode.paged_cache.PagedCache`: [B, S_new, H, D_v].

    Args:
        mask: a form of :func:`pumice.integrations.attention.attention_mask`, not the fourth.

    Raises:
        NotImplementedError: as above, and masks of any pattern.
    """
    layer_idx = _self_attention(module, query, key)
    if mask is not None and mask.dim() == 4:
        raise NotImplementedError(
            f"{type(module).__name__}: over a PagedCache attention is causal, with padding and a "
            "sliding window; a four-dimensional attention_mask is not supported"
        )
    if mask is not None and mask.dim() == 3:  # with a window, which the layer names too
        options["sliding_window"] = options["sliding_window"] or mask.shape[1]
        mask = mask[:, 0]
    return cache.attend(layer_idx, query, key, value, mask, **_options(**options))


def _self_attention(module: nn.Module, query: Tensor, key: Tensor) -> int:
    """The index of a causal layer in which every token brings a query, a key and a value."""
    layer_idx = getattr(module, "layer_idx", None)
    causal = getattr(module, "is_causal", True)
    if layer_idx is None or not causal or query.shape[2] != key.shape[2]:
        raise NotImplementedError(
            f"{type(module).__name__}: a paged cache is for causal self-attention whose layer_idx "
            f"is known; here layer_idx is {layer_idx}, is_causal {causal}, with queries and keys "
            f"of shapes {list(query.shape)} and {list(key.shape)}"
        )
    index: int = layer_idx
    return index


def _options(
    scaling: float | None, sliding_window: int | None, softcap: float | None, s_aux: Tensor | None
) -> dict[str, Any]:
    """transformers' names of what the operator calls otherwise."""
    return {
        "softmax_scale": scaling,
        "window": (-1 if sliding_window is None else sliding_window - 1, -1),
        "sinks": s_aux,
        "softcap": softcap or 0.0,
    }


def check_model(model: Any) -> None:
    """Refuse models of which a paged cache cannot hold all the state.

    Raises:
        NotImplementedError: encoder-decoders, layers that are not (windowed) attention.
    """
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{name}: encoder-decoder models are not supported")
    others = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        raise NotImplementedError(
            f"{name}: a paged cache holds keys and values of full and sliding-window attention; "
            f"this model has layers of type {', '.join(sorted(map(str, others)))}"
        )


def forward(
    model: Any, batch: PagedBatch, rows: Tensor | None, with_config: Iterable[Any]
) -> Tensor:
    """Logits of the tokens ``rows``, or of all, of a model of transformers.

    ``with_config``: its modules that have a ``config``.
    """
    # Four-dimensional masks are handed through as they are. Without one, some models make their
    # own from positions that start again, S × S, to keep packed sequences apart.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_forward)
    with attention_implementation(with_config, NAME):
        token = _running.set(batch)
        try:
            output = model(
                input_ids=batch.input_ids[None],
                position_ids=batch.positions[None],
                attention_mask=mask,
                use_cache=False,
                logits_to_keep=0 if rows is None else rows,
            )
        finally:
            _running.reset(token)
    logits: Tensor = output.logits[0]
    return logits


@contextmanager
def attention_implementation(with_config: Iterable[Any], name: str) -> Iterator[None]:
    """``attn_implementation=name`` for the time being, in the configs of these modules.

    Written into the configurations, where the layers look it up at every call. What
    ``set_attn_implementation`` does besides, checking and loading kernels, takes longer than a
    decoding step of a small model.
    """
    # By identity, for configurations are compared by value, and not hashed.
    configs = {id(module.config): module.config for module in with_config}
    before = [
        (config, config._attn_implementation_internal)
        for config in configs.values()
        if hasattr(config, "_attn_implementation_internal")
    ]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in before:
            config._attn_implementation_internal = own
