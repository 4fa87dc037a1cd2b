"""A language model over a paged cache, whatever it is made of.

Two kinds of model are taken.

*A model of transformers* whose attention goes through its attention interface (Llama, Qwen,
Mistral, Gemma, gpt-oss, GPT-2, GPT-NeoX and most others since 4.48). For the time of a call its
attention implementation is "pumice" (:mod:`pumice.integrations.attention_paged`).

*Any module with a method* ::

    def forward_paged(self, input_ids, positions, batch, rows) -> Tensor: ...

``input_ids`` and ``positions`` are int64 [T]: tokens of all sequences, end to end, and the position
of each. Everything in a transformer but attention treats tokens one by one, so [T] instead of
[B, S] changes nothing there; attention of layer i is ::

    out = batch.attend(i, query, key, value)       # [T, H, D], [T, H_kv, D], [T, H_kv, D_v]

after the rotation, if there is one (by ``positions``). ``rows`` is None, or int64 [R]: the result
is the logits of these tokens, [R, V], else of all, [T, V].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from pumice._calibrate import evaluation_mode
from pumice.decode.batch import PagedBatch
from pumice.decode.modules import ModuleWalk
from pumice.decode.pool import CachePool, LayerShape
from pumice.integrations import is_transformers_model

__all__ = ["Geometry", "PagedModel"]


@dataclass(frozen=True)
class Geometry:
    """What a cache must know of a model.

    ``windows``: for each layer the tokens a query looks back at most, itself left out, or None.
    ``window_left`` is what a :class:`~pumice.decode.BlockManager` may reclaim by: the widest of
    them, None where any layer sees everything.
    """

    layers: tuple[LayerShape, ...]
    windows: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device
    vocab_size: int

    @property
    def window_left(self) -> int | None:
        known = [window for window in self.windows if window is not None]
        return max(known) if len(known) == len(self.windows) else None


class PagedModel:
    """Runs a model on packed batches; see the module's docstring for which.

    Raises:
        TypeError: neither kind.
        NotImplementedError: a model of transformers of which we know that a paged cache does not
            hold all its state: encoder-decoders, recurrent or convolutional layers, chunked
            attention.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"a paged cache needs a model, a torch.nn.Module, not {type(model).__name__}"
            )
        self.model = model
        self._walk = ModuleWalk(model)
        self._walked: list[nn.Module] = []  # what _with_config was found in
        self._with_config: list[Any] = []
        self.is_transformers = is_transformers_model(model) and not hasattr(model, "forward_paged")
        if self.is_transformers:
            from pumice.integrations import attention_paged

            attention_paged.check_model(model)
        elif not hasattr(model, "forward_paged"):
            raise TypeError(
                f"{type(model).__name__} is no model of transformers and has no method "
                "forward_paged(input_ids, positions, batch, rows); pumice.decode.model says what "
                "that does"
            )

    @cached_property
    def geometry(self) -> Geometry:
        """Found by running one token through the model."""
        return _geometry(self)

    def forward(self, batch: PagedBatch, rows: Tensor | None = None) -> Tensor:
        """Logits [R, V] of the tokens ``rows``, int64 [R], or of all T.

        Writes the batch's keys and values. In evaluation mode and without gradients; the modules'
        modes and the attention implementation are put back, also after an error.

        Raises:
            RuntimeError: attention of some layer did not come from ``batch.attend``.
        """
        logits = self.run(batch, rows)
        if batch.attended != list(range(len(self.geometry.layers))):
            raise RuntimeError(
                f"{type(self.model).__name__}: attention ran in the layers {batch.attended}, but "
                f"must once in each of 0 … {len(self.geometry.layers) - 1}"
            )
        return logits

    def run(self, batch: PagedBatch, rows: Tensor | None) -> Tensor:
        """As :meth:`forward`, without a look at what the layers did."""
        batch.attended.clear()
        modules = self._walk()
        with self._evaluating(modules), torch.inference_mode():
            if self.is_transformers:
                from pumice.integrations import attention_paged

                if self._walked is not modules:
                    self._walked = modules
                    self._with_config = [m for m in modules if hasattr(m, "config")]
                return attention_paged.forward(self.model, batch, rows, self._with_config)
            method: Any = self.model.forward_paged
            return cast(Tensor, method(batch.input_ids, batch.positions, batch, rows))

    @contextmanager
    def _evaluating(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        if not any(module.training for module in modules):
            yield
            return
        with evaluation_mode(self.model):
            yield


@dataclass
class _Look(PagedBatch):
    """A batch of single tokens that notes what each layer brings; each token sees itself alone."""

    seen: list[tuple[Tensor, Tensor, Tensor, int]] = field(default_factory=list)

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        self.attended.append(layer_idx)
        self.seen.append((query, key, value, options.get("window", (-1, -1))[0]))
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1)


def look(
    model: PagedModel, token: int = 0, positions: Sequence[int] = (0,)
) -> tuple[list[tuple[Tensor, Tensor, Tensor, int]], Tensor]:
    """(query, key, value, window) of each layer for one token at these positions, and its logits.

    All in one pass: each row is the token at one of the positions.
    """
    device = next((p.device for p in model.model.parameters()), torch.device("cpu"))
    at = torch.tensor(positions, device=device)
    empty = at.new_empty(0, dtype=torch.int32)
    ids = torch.full_like(at, token)
    batch = _Look(ids, at, ids, empty, empty, empty, 1, cast(CachePool, None))
    logits = model.run(batch, None)
    name = type(model.model).__name__
    if not batch.attended:
        way = "the attention interface of transformers" if model.is_transformers else "batch.attend"
        raise NotImplementedError(
            f"{name}: no layer's attention came to the paged cache: it does not go through {way}"
        )
    if batch.attended != list(range(len(batch.attended))):
        raise NotImplementedError(
            f"{name}: attention ran in the layers {batch.attended}, not once in each of 0, 1, … in "
            "order; layers that share a cache or keep another state are not supported"
        )
    return batch.seen, logits


def _geometry(model: PagedModel) -> Geometry:
    try:
        seen, logits = look(model)
    except NotImplementedError:
        raise
    except Exception as error:  # whatever a model of another kind makes of one packed token
        raise NotImplementedError(
            f"{type(model.model).__name__} cannot run over a paged cache: one token as a packed "
            f"batch gave {type(error).__name__}: {error}"
        ) from error
    _, keys, values, windows = zip(*seen, strict=True)
    for what in ("device", "dtype"):
        kinds = {getattr(key, what) for key in keys}
        if len(kinds) > 1:
            raise NotImplementedError(
                f"{type(model.model).__name__}: the layers' keys are of more than one {what}, "
                f"{', '.join(sorted(map(str, kinds)))}; a pool is of one"
            )
    return Geometry(
        layers=tuple(
            LayerShape(key.shape[1], key.shape[2], value.shape[2])
            for key, value in zip(keys, values, strict=True)
        ),
        windows=tuple(None if left < 0 else left for left in windows),
        dtype=keys[0].dtype,
        device=keys[0].device,
        vocab_size=logits.shape[-1],
    )
