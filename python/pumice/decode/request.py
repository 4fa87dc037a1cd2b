"""A request for text: what is wanted, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_SEED", "Request", "SamplingParams", "UnknownRequestError", "check_prompt"]

MAX_SEED = 2**63 - 1


class UnknownRequestError(LookupError):
    """An id that names no request, or one that has ended."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when they end.

    With the logits l of a position, the next token is drawn from softmax(l / temperature) cut to
    the ``top_k`` most probable tokens, then to the fewest whose mass reaches ``top_p``, then to
    those with at least ``min_p`` times the largest probability: see :func:`pumice.ops.sample`.

    Args:
        max_new_tokens: generate no more than so many.
        temperature: 0 takes the most probable token (greedy).
        top_k: 0 for no limit. top_p: 1 for none. min_p: 0 for none.
        seed: the token at position i of the sequence depends on the seed, i and the logits alone,
            not on what else is in the batch. None: the engine draws one and reports it.
        n: so many samples of one prompt, which is computed once. Sample i has ``seed + i``: it is
            what a request of its own with that seed gives.
        stop_token_ids: end after one of these, beside the model's own end-of-sequence tokens.
        stop: end where one of these appears: strings (found in the text across tokens, and not part
            of it; needs the engine's tokenizer), or sequences of token ids.
        ignore_eos: the model's end-of-sequence tokens do not end it.
        logprobs: report ln p of each token under softmax(l), nothing scaled or cut.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of its range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str | tuple[int, ...], ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 1, 2**29)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_int("n", self.n, 1, 2**16)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED - self.n + 1)
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        if self.top_p == 0:
            raise ValueError("top_p must be above 0 (temperature = 0 takes the likeliest token)")
        for name in ("ignore_eos", "logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        # Frozen, and yet lists are welcome.
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "stop", _stops(self.stop))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(stop for stop in self.stop if isinstance(stop, str))

    @property
    def stop_sequences(self) -> tuple[tuple[int, ...], ...]:
        return tuple(stop for stop in self.stop if not isinstance(stop, str))


@dataclass(eq=False)
class Request:
    """One sequence that is being generated. The scheduler and the engine move it along.

    ``tokens`` holds the prompt and what was generated; keys and values of the first
    ``num_computed`` of them are in the cache, as the block manager's ``sequence``. ``generating``:
    all that is left to compute is the last token, whose logits give the next one (and not the
    first of several samples).
    """

    id: int  # of this sequence: each of n samples has its own
    request_id: int  # of the request it belongs to
    index: int  # which of the samples
    params: SamplingParams
    seed: int
    prompt_len: int
    tokens: list[int]
    forks: int = 1  # samples that branch off when the prompt is computed, itself included
    sequence: int = -1  # no sequence: waiting
    num_computed: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache when it first ran
    preemptions: int = 0
    # A forward pass with this request raised: until so many tokens are computed it runs alone.
    suspect_until: int = 0
    # The tokens as an array, as long as the request waits: to match prefixes again and again.
    array: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.params.max_new_tokens - self.num_generated

    @property
    def generating(self) -> bool:
        return self.num_computed == len(self.tokens) - 1 and self.forks == 1

    @property
    def suspect(self) -> bool:
        return self.num_computed < self.suspect_until


def check_prompt(prompt: Any, vocab_size: int | None) -> npt.NDArray[np.int32]:
    """The token ids of a prompt: a vector of integers, given as list, array or tensor.

    Raises:
        TypeError: not integers, or not a vector. ValueError: empty, or a token that the model's
            vocabulary does not have.
    """
    numbers = prompt.detach().cpu().numpy() if hasattr(prompt, "detach") else prompt
    try:
        ids = np.asarray(numbers)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"prompt must be a vector of token ids, not {prompt!r:.80}") from error
    if ids.ndim == 1 and ids.size == 0:
        raise ValueError("prompt is empty: a first token is needed (a tokenizer's bos_token_id)")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TypeError(
            f"prompt must be a vector of integer token ids, not {ids.dtype} of shape "
            f"{list(ids.shape)}"
        )
    if vocab_size is not None:
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if wrong.size:
            raise ValueError(
                f"prompt: token {ids[wrong[0]]} at position {wrong[0]} is not one of the model's "
                f"vocabulary of {vocab_size}"
            )
    return ids.astype(np.int32)


def _check_int(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be in [{least}, {most}], not {value}")


def _check_float(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not (math.isfinite(value) and least <= value <= most):
        raise ValueError(f"{name} must be a number in [{least:g}, {most:g}], not {value}")


def _token_ids(ids: Sequence[int]) -> tuple[int, ...]:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise TypeError(f"stop_token_ids must be a sequence of token ids, not {ids!r}")
    for id in ids:
        _check_int("a token of stop_token_ids", id, 0, 2**31 - 1)
    return tuple(map(int, ids))


def _stops(stops: Sequence[str | Sequence[int]]) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(stops, str):
        stops = (stops,)
    if not isinstance(stops, Sequence):
        raise TypeError(f"stop must be strings or sequences of token ids, not {stops!r}")
    checked: list[str | tuple[int, ...]] = []
    for stop in stops:
        if not isinstance(stop, Sequence):
            raise TypeError(
                f"stop must hold strings or sequences of token ids, not {stop!r} (single tokens: "
                "stop_token_ids)"
            )
        if not stop:
            raise ValueError("stop holds an empty string or sequence, which would end everything")
        checked.append(stop if isinstance(stop, str) else _token_ids(stop))
    return tuple(checked)
