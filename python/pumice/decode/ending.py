"""When a sequence ends, and what of its text is certain until then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pumice.decode.output import FinishReason, Output, TextStream
from pumice.decode.request import Request

__all__ = ["Ending"]

_CONTEXT = 12  # tokens of the prompt that its continuation is decoded with


class Ending:
    """The stop conditions of one sequence. ``take`` gives it new tokens, and says what they do.

    Args:
        request: whose parameters count.
        eos_token_ids: of the model.
        tokenizer: for text and stop strings; None for neither.
    """

    __slots__ = ("_last_tokens", "_sequences", "_text")

    def __init__(self, request: Request, eos_token_ids: frozenset[int], tokenizer: Any) -> None:
        params = request.params
        self._last_tokens = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self._last_tokens |= eos_token_ids
        self._sequences = params.stop_sequences
        self._text: TextStream | None = None
        if tokenizer is not None:
            begin = max(0, request.prompt_len - _CONTEXT)
            context = request.tokens[begin : request.prompt_len]
            self._text = TextStream(tokenizer, params.stop_strings, context)

    def take(self, request: Request, tokens: Sequence[int], logprobs: list[float] | None) -> Output:
        """Append what was drawn to the request, up to where it ends.

        With stop strings tokens are looked at one by one: none follows the one that completes it.
        """
        output = Output(request.request_id, request.index, [], seed=request.seed)
        if self._text is not None:
            output.text = ""
        for token in tokens:
            request.tokens.append(token)
            output.tokens.append(token)
            if self._text is not None:
                output.text += self._text.add((token,))  # type: ignore[operator]
            if self._ended(request, token, output):
                break
        if logprobs is not None:
            output.logprobs = logprobs[: len(output.tokens)]
        if output.finish_reason is not None and self._text is not None:
            self._finish(self._text, output)
        return output

    def end(self, request: Request, reason: FinishReason, error: BaseException | None) -> Output:
        """The end for another reason than a token."""
        return Output(
            request.request_id, request.index, [], None if self._text is None else "",
            finish_reason=reason, error=error, seed=request.seed,
        )  # fmt: skip

    def _ended(self, request: Request, token: int, output: Output) -> bool:
        if token in self._last_tokens:
            output.finish_reason, output.stop = "stop", token
        elif self._text is not None and self._text.stopped_by is not None:
            output.finish_reason, output.stop = "stop", self._text.stopped_by
        elif self._sequences and (stop := self._sequence_at_end(request)) is not None:
            output.finish_reason, output.stop = "stop", stop
        elif request.remaining <= 0:
            output.finish_reason = "length"
        return output.finish_reason is not None

    def _sequence_at_end(self, request: Request) -> tuple[int, ...] | None:
        """Whether what was generated, without the prompt, ends with a stop sequence."""
        for stop in self._sequences:
            if len(stop) <= request.num_generated and tuple(request.tokens[-len(stop) :]) == stop:
                return stop
        return None

    def _finish(self, text: TextStream, output: Output) -> None:
        """Text that was held back; it may yet hold a stop string, at a character cut off."""
        rest = text.finish()
        output.text = (output.text or "") + rest
        if text.stopped_by is not None and output.stop is None:
            output.finish_reason, output.stop = "stop", text.stopped_by
