"""What comes out of a request: tokens, text, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Completion", "FinishReason", "Output", "TextStream"]

FinishReason = Literal["stop", "length", "error", "cancelled"]

_REPLACEMENT = "\ufffd"
_LONGEST_CUT = 3  # bytes of a character that is cut off: one less than UTF-8's longest


@dataclass(slots=True)
class Output:
    """What one step added to one sequence.

    ``id`` is that of the request, ``index`` says which of its samples. ``tokens`` are new;
    ``logprobs`` theirs, where asked for. ``text`` is what became certain of the text: None without
    a tokenizer, and it may lag behind the tokens (characters of several tokens, stop strings).
    ``finish_reason`` is None while there is more to come; "stop" for an end-of-sequence or stop
    token (``stop`` is that token) or a stop string or sequence (``stop`` is that), "length", or
    "error" with the exception in ``error``. ``seed`` is the sample's own: it is given again by a
    request with that seed.
    """

    id: int
    index: int
    tokens: list[int]
    text: str | None = None
    logprobs: list[float] | None = None
    finish_reason: FinishReason | None = None
    stop: int | str | tuple[int, ...] | None = None
    error: BaseException | None = None
    seed: int = 0

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class Completion:
    """All that was generated for one sample of one prompt; the tokens do not repeat the prompt.

    ``text`` is None without a tokenizer. The fields are those of :class:`Output`; with ``seed`` the
    same sample comes again.
    """

    prompt_index: int
    index: int
    seed: int
    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    logprobs: list[float] | None = None
    finish_reason: FinishReason | None = None
    stop: int | str | tuple[int, ...] | None = None
    error: BaseException | None = None


class TextStream:
    """Tokens in, text out, piece by piece: the pieces together are the text of all tokens.

    A token may hold a part of a character: what has not become certain is held back. Decoders put
    U+FFFD for bytes that are no character (yet), so a trailing run of them waits for the next
    token; a run longer than a character's bytes is certain but for its end. Tokens are decoded with
    a few before them, since some decoders treat the first one specially.

    ``context``: the end of the prompt, which the text continues; at best a dozen tokens.
    ``stops``: the text ends before the first of these; what might become one is held back.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), context: Sequence[int] = ()
    ) -> None:
        self._decode = _decoder(tokenizer)
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._begin = 0  # tokens before this are not decoded any more
        self._given = 0  # characters that were given out of the text from _begin
        self._settled = 0  # tokens up to this have given all their text
        self._held = ""  # might be the beginning of a stop string
        self.stopped_by: str | None = None
        if context:
            self._advance(context)

    def add(self, tokens: Sequence[int]) -> str:
        """The text that became certain. After a stop string there is none any more."""
        return "" if self.stopped_by is not None else self._until_stop(self._advance(tokens))

    def finish(self) -> str:
        """What was held back, as there are no more tokens."""
        if self.stopped_by is not None:
            return ""
        text = self._decode(self._tokens[self._begin :])
        return self._until_stop(self._take(text, len(text)), final=True)

    def _advance(self, tokens: Sequence[int]) -> str:
        self._tokens.extend(tokens)
        text = self._decode(self._tokens[self._begin :])
        uncertain = len(text) - len(text.rstrip(_REPLACEMENT))
        new = self._take(text, len(text) - min(uncertain, _LONGEST_CUT))
        if new and not uncertain:
            # The tokens since the last such place suffice as context from here on.
            self._begin, self._settled = self._settled, len(self._tokens)
            self._given = len(self._decode(self._tokens[self._begin :]))
        return new

    def _take(self, text: str, end: int) -> str:
        new, self._given = text[self._given : end], max(self._given, end)
        return new

    def _until_stop(self, new: str, *, final: bool = False) -> str:
        if not self._stops:
            return new
        text = self._held + new
        found = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            place, self.stopped_by = min(found, key=lambda pair: pair[0])
            self._held = ""
            return text[:place]
        keep = 0 if final else max(_beginning_at_end(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _beginning_at_end(text: str, stop: str) -> int:
    """Length of the longest end of text that is a beginning of stop."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _decoder(tokenizer: Any) -> Any:
    def decode(tokens: list[int]) -> str:
        text: str = tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    return decode
