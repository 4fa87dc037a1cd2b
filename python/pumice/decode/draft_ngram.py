"""Drafts without a model: what followed the last time that the text stood like this.

Summaries, edits and programs repeat their own words and those of the prompt. The longest n-gram
that ends the text and occurred earlier in it is found, and what followed it there is proposed
(prompt lookup decoding, Saxena, 2023; LLMA, Yang et al., "Inference with Reference", 2023,
arXiv:2304.04487).
"""

from __future__ import annotations

from collections.abc import Sequence

from pumice.decode.draft import DraftRequest, Proposal
from pumice.decode.gamma import AdaptiveGamma, PacedDraft

__all__ = ["NgramDraft", "NgramIndex"]


class NgramIndex:
    """Where the n-grams of a growing text were followed by something.

    For n = min_ngram … max_ngram each n-gram is a key, whose value is the places after its
    latest occurrences: at most ``remember``, latest first, of which no two hold the same token. A
    new token costs one insertion for each n, however long the text is.
    """

    def __init__(self, min_ngram: int, max_ngram: int, remember: int = 1) -> None:
        self.min_ngram = min_ngram
        self.max_ngram = max_ngram
        self.remember = remember
        self.tokens: list[int] = []
        self._followed: dict[tuple[int, ...], list[int]] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            end = len(self.tokens)
            for n in range(self.min_ngram, min(self.max_ngram, end) + 1):
                places = self._followed.setdefault(tuple(self.tokens[end - n :]), [])
                others = [place for place in places if self.tokens[place] != token]
                places[:] = [end, *others[: self.remember - 1]]
            self.tokens.append(token)

    def places(self) -> list[int]:
        """Where the text may go on: after the longest n-gram that ends it, then after shorter ones.

        Of places that hold the same token only the first is given.
        """
        found: dict[int, int] = {}
        for n in range(min(self.max_ngram, len(self.tokens)), self.min_ngram - 1, -1):
            for place in self._followed.get(tuple(self.tokens[-n:]), ()):
                found.setdefault(self.tokens[place], place)
        return list(found.values())

    def continuation(self, place: int, length: int) -> list[int]:
        """``length`` tokens from a place on. Past the end of the text they repeat themselves, as
        in LZ77: after "a b a b" comes "a b a b a b …"."""
        copied: list[int] = []
        known = len(self.tokens)
        for i in range(place, place + length):
            copied.append(self.tokens[i] if i < known else copied[i - known])
        return copied


class NgramDraft(PacedDraft):
    """Proposes what followed the longest earlier occurrence of the text's end.

    ``gamma``: tokens to propose at a time, or an :class:`AdaptiveGamma`. ``max_ngram``: the
    longest n-gram looked for; the latest of its occurrences counts. ``min_ngram``: a match shorter
    than this is not worth a guess.
    """

    def __init__(
        self, gamma: int | AdaptiveGamma = 8, *, max_ngram: int = 4, min_ngram: int = 2
    ) -> None:
        super().__init__(gamma)
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(
                f"NgramDraft: 1 <= min_ngram <= max_ngram must hold, not {min_ngram} and "
                f"{max_ngram}"
            )
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self._indices: dict[int, NgramIndex] = {}

    def draft(self, requests: Sequence[DraftRequest], limits: Sequence[int]) -> Proposal:
        return Proposal.of([self._one(r, limit) for r, limit in zip(requests, limits, strict=True)])

    def index(self, request: DraftRequest) -> NgramIndex:
        """The index of a request's tokens, grown by those that are new."""
        index = self._indices.get(request.id)
        if index is None:
            index = self._indices[request.id] = NgramIndex(self.min_ngram, self.max_ngram)
        index.extend(request.tokens[len(index.tokens) :])
        return index

    def _one(self, request: DraftRequest, limit: int) -> list[int]:
        index = self.index(request)  # also where nothing is wanted: later calls find less to do
        places = index.places() if limit else []
        return index.continuation(places[0], limit) if places else []

    def release(self, id: int) -> None:
        super().release(id)
        self._indices.pop(id, None)
