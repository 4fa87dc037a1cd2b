"""How well a model predicts a text without end: the table of the StreamingLLM paper."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pumice.decode.streaming import StreamingModel

__all__ = ["StreamPerplexity", "recomputed_perplexity", "stream_perplexity"]

OnSegment = Callable[[int, int], None]


@dataclass(frozen=True)
class StreamPerplexity:
    """exp(mean negative log-likelihood) over a stream, and how it went on the way.

    ``segment_nll``: mean over the predicted tokens of each segment of the text, in nats.
    ``segment_seconds``: what each took. ``cache_bytes``: the memory of keys and values.
    """

    segment_nll: tuple[float, ...]
    segment_seconds: tuple[float, ...]
    segment: int  # tokens a segment; the last may be shorter
    tokens: int  # predicted tokens
    mean_nll: float
    cache_bytes: int

    @property
    def perplexity(self) -> float:
        return _exp(self.mean_nll)

    def part(self, first: int, last: int | None = None) -> float:
        """The perplexity of the segments first … last − 1 (of equal length, but for the end)."""
        return _exp(statistics.fmean(self.segment_nll[first:last]))


def stream_perplexity(
    model: nn.Module,
    tokens: Sequence[int] | Tensor,
    *,
    sinks: int = 4,
    window: int | None = 1020,
    segment: int = 256,
    cache_dtype: torch.dtype | None = None,
    on_segment: OnSegment | None = None,
) -> StreamPerplexity:
    """Perplexity of one text read as a stream, every token once.

    Args:
        model, sinks, window, cache_dtype: see :class:`~pumice.decode.StreamingModel`. With
            ``window=None`` every token sees all before it: dense attention, beyond the trained
            context too, whose memory and time grow.
        tokens: [n] at least 2.
        segment: tokens at a time, and what an item of ``segment_nll`` is over.
        on_segment: called as ``on_segment(tokens so far, all)``.
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
        chunk=segment,
        cache_dtype=cache_dtype,
    )
    means, seconds, total = [], [], 0.0
    for start in range(0, len(ids) - 1, segment):
        begun = time.perf_counter()
        inputs = ids[start : min(start + segment, len(ids) - 1)]
        targets = ids[start + 1 : start + 1 + len(inputs)]
        loss = _nll(stream.forward(inputs), targets)
        seconds.append(time.perf_counter() - begun)
        means.append(loss / len(inputs))
        total += loss
        if on_segment:
            on_segment(start + len(inputs), len(ids) - 1)
    count = len(ids) - 1
    return StreamPerplexity(
        tuple(means), tuple(seconds), segment, count, total / count, stream.pool.nbytes
    )


def recomputed_perplexity(
    model: nn.Module,
    tokens: Sequence[int] | Tensor,
    *,
    window: int,
    every: int = 1,
    on_segment: OnSegment | None = None,
) -> StreamPerplexity:
    """What a model can do with the last ``window`` tokens: each prediction from scratch.

    The paper's reference, "sliding window with re-computation": token i is predicted by running the
    model on tokens i − window … i − 1 at positions 0 … window − 1. That is window times the work,
    so with ``every`` only each so-many-th token is predicted, from token ``window`` on; each is a
    segment.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64)
    if window < 1 or every < 1 or ids.dim() != 1 or len(ids) <= window:
        raise ValueError(
            f"recomputed_perplexity: tokens must be [n] with more than window = {window} ≥ 1 of "
            f"them, every ≥ 1, not {list(ids.shape)} and {every}"
        )
    stream = StreamingModel(model, sinks=0, window=window, chunk=window)
    means, seconds = [], []
    places = range(window, len(ids), every)
    for place in places:
        begun = time.perf_counter()
        stream.reset()
        logits = stream.forward(ids[place - window : place], last=True)
        means.append(_nll(logits, ids[place : place + 1]))
        seconds.append(time.perf_counter() - begun)
        if on_segment:
            on_segment(place, len(ids))
    return StreamPerplexity(
        tuple(means), tuple(seconds), 1, len(means), statistics.fmean(means), stream.pool.nbytes
    )


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Σ −log softmax(logits)[target], in float32 whatever the logits are in."""
    targets = targets.to(logits.device)
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 709 else math.inf if nats == nats else math.nan
