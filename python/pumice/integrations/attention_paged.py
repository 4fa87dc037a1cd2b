"""Models of transformers over a paged cache.

T tokens of many sequences stand in one row without padding; what belongs together is in a
:class:`~pumice.decode.PagedBatch`, to which a layer's attention is left. So no mask is made.

The batch comes to the layers by a context variable (:func:`forward`), or where somebody calls a
model himself as ``model(..., paged_batch=batch)``: most models hand keyword arguments they do not
know down to the attention function, but not all do in every version of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pumice.decode.batch import PagedBatch

NAME = "pumice"

running_batch: ContextVar[PagedBatch | None] = ContextVar("running_batch", default=None)

_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}


def paged_attention_forward(
    module: nn.Module,
    batch: PagedBatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """One layer's attention: query [1, H, T, D], key and value [1, H_kv, T, …] → [1, T, H, D_v].

    Raises:
        NotImplementedError: a layer that is not causal, or does not say which it is.
    """
    layer_idx = getattr(module, "layer_idx", None)
    name = type(module).__name__
    if layer_idx is None or not getattr(module, "is_causal", True):
        raise NotImplementedError(
            f"{name}: a paged cache is for causal self-attention whose layer_idx is known; here "
            f"layer_idx is {layer_idx}, is_causal {getattr(module, 'is_causal', True)}"
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise NotImplementedError(
            f"{name}: a paged batch is one row of tokens, each with query, key and value, but "
            f"query has shape {list(query.shape)} and key {list(key.shape)}"
        )
    return batch.attend(
        layer_idx,
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),
        softmax_scale=scaling,
        window=(-1 if sliding_window is None else sliding_window - 1, -1),
        sinks=s_aux,
        softcap=softcap or 0.0,
    )[None]


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


def forward(model: Any, batch: PagedBatch, rows: Tensor | None) -> Tensor:
    """Logits of the tokens ``rows``, or of all, of a model of transformers."""
    # Four-dimensional masks are handed through as they are. Without one, some models make their
    # own from positions that start again, S × S, to keep packed sequences apart.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    with attention_implementation(model, NAME):
        token = running_batch.set(batch)
        try:
            output = model(
                input_ids=batch.input_ids[None],
                position_ids=batch.positions[None],
                attention_mask=mask,
                use_cache=False,
                logits_to_keep=0 if rows is None else rows,
            )
        finally:
            running_batch.reset(token)
    logits: Tensor = output.logits[0]
    return logits


@contextmanager
def attention_implementation(model: Any, name: str) -> Iterator[None]:
    """``attn_implementation=name`` for the time being.

    Written into the configurations, where the layers look it up at every call. What
    ``set_attn_implementation`` does besides, checking and loading kernels, takes longer than a
    decoding step of a small model.
    """
    from pumice.integrations import attention

    attention.register()
    # By identity, for configurations are compared by value, and not hashed.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
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
