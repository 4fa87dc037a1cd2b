"""How well a model predicts a text without end: the table of the StreamingLLM paper."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pumice.decode.streaming import StreamingModel

__all__ = ["StreamPerplexity", "recomputed_perplexity", "stream_perplexity"]

OnChunk = Callable[[int, int], None]


@dataclass(frozen=True)
class StreamPerplexity:
    """exp(mean negative log-likelihood) over a text, token by token.

    ``token_nll``: fp32 [n], −ln of the probability that each predicted token had, in nats.
    ``places``: int64 [n], which tokens of the text these are.
    ``seconds``: for all of it. ``cache_bytes``: the memory of keys and values.
    """

    token_nll: Tensor
    places: Tensor
    seconds: float
    cache_bytes: int

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return len(self.token_nll)

    @property
    def mean_nll(self) -> float:
        return float(self.token_nll.double().mean())

    @property
    def perplexity(self) -> float:
        return _exp(self.mean_nll)

    def between(self, first: int, last: int) -> float:
        """The perplexity of the tokens first … last − 1 of the text, as far as predicted."""
        chosen = (self.places >= first) & (self.places < last)
        return _exp(float(self.token_nll[chosen].double().mean()))

    def at(self, places: Tensor) -> float:
        """The perplexity of certain tokens: for a fair comparison with one that knows only them."""
        return _exp(float(self.token_nll[torch.isin(self.places, places)].double().mean()))


def stream_perplexity(
    model: nn.Module,
    tokens: Sequence[int] | Tensor,
    *,
    sinks: int = 4,
    window: int | None = 1020,
    chunk: int = 256,
    cache_dtype: torch.dtype | None = None,
    on_chunk: OnChunk | None = None,
) -> StreamPerplexity:
    """Perplexity of one text read as a stream, every token once.

    Args:
        model, sinks, window, cache_dtype: see :class:`~pumice.decode.StreamingModel`. With
            ``window=None`` every token sees all before it: dense attention, beyond the trained
            context too, whose memory and time grow.
        tokens: [n] at least 2.
        chunk: tokens at a time; changes nothing but speed and the memory of logits.
        on_chunk: called as ``on_chunk(tokens so far, all)``.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(
            f"stream_perplexity: tokens must be two or more, [n], not {list(ids.shape)}"
        )
    stream = StreamingModel(
        model,
        sinks=sinks if window is not None else 0,
        window=len(ids) if window is None else window,
        chunk=chunk,
        cache_dtype=cache_dtype,
    )
    begun, losses = time.perf_counter(), []
    for inputs, targets in zip(ids[:-1].split(chunk), ids[1:].split(chunk), strict=True):
        losses.append(_nll(stream.forward(inputs), targets))
        if on_chunk:
            on_chunk(stream.length, len(ids) - 1)
    seconds = time.perf_counter() - begun
    return StreamPerplexity(
        torch.cat(losses), torch.arange(1, len(ids)), seconds, stream.pool.nbytes
    )


def recomputed_perplexity(
    model: nn.Module,
    tokens: Sequence[int] | Tensor,
    *,
    window: int,
    every: int = 1,
    on_chunk: OnChunk | None = None,
) -> StreamPerplexity:
    """What a model can do with the last ``window`` tokens: each prediction from scratch.

    The paper's reference, "sliding window with re-computation": token i is predicted by running the
    model on tokens i − window … i − 1 at positions 0 … window − 1. That is window times the work,
    so with ``every`` only each so-many-th token is predicted, from token ``window`` on.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    if window < 1 or every < 1 or ids.dim() != 1 or len(ids) <= window:
        raise ValueError(
            f"recomputed_perplexity: tokens must be [n] with more than window = {window} ≥ 1 of "
            f"them, every ≥ 1, not {list(ids.shape)} and {every}"
        )
    stream = StreamingModel(model, sinks=0, window=window, chunk=window)
    begun, losses = time.perf_counter(), []
    places = torch.arange(window, len(ids), every)
    for place in places.tolist():
        stream.reset()
        logits = stream.forward(ids[place - window : place], last=True)
        losses.append(_nll(logits, ids[place : place + 1]))
        if on_chunk:
            on_chunk(place, len(ids))
    seconds = time.perf_counter() - begun
    return StreamPerplexity(torch.cat(losses), places, seconds, stream.pool.nbytes)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(logits)[target], fp32 on the CPU, whatever the logits are in."""
    targets = targets.to(logits.device)
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none").cpu()


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 709 else math.inf if nats == nats else math.nan
