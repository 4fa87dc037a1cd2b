"""The engine's side of speculative decoding: asks a draft, tells it what came of it.

A draft may be anybody's code, and is only there to save time: where it raises, or proposes what
cannot be, its step goes without, after a RuntimeWarning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from pumice.decode.draft import Draft, DraftRequest, check_vocabulary
from pumice.decode.request import Request
from pumice.decode.sampler import Choice, Guesses
from pumice.decode.scheduler import Plan, Scheduler

__all__ = ["Drafting"]


class Drafting:
    """One draft, for one engine. ``drafted`` tokens were looked at, ``accepted`` of them kept.

    Raises ValueError for a draft with another vocabulary.
    """

    def __init__(self, draft: Draft, vocab_size: int) -> None:
        check_vocabulary(draft, vocab_size)
        self.draft = draft
        self.vocab_size = vocab_size
        self.drafted = self.accepted = 0

    def propose(self, scheduler: Scheduler) -> Guesses | None:
        """Guesses for the requests that generate, as many as the next pass has room for."""
        requests = scheduler.generating()
        if not requests:
            return None
        room = scheduler.max_batch_tokens - len(requests)
        if scheduler.waiting or len(requests) < len(scheduler.running):
            room //= 2  # the rest is for prompts that are still to be read
        most = min(room // len(requests), self.draft.max_drafts)
        asked = [
            DraftRequest(r.id, r.tokens, min(r.remaining - 1, most), r.params, r.seed)
            for r in requests
        ]
        try:
            proposal = self.draft.propose(asked)
            counts, tokens = proposal.num_drafts.tolist(), proposal.tokens.tolist()
            guesses = {
                request.id: self._checked(row[:count], count, request)
                for request, row, count in zip(asked, tokens, counts, strict=True)
            }
        except Exception as error:
            self._warn(error)
            return None
        return Guesses(proposal, {r.id: i for i, r in enumerate(requests)}, guesses)

    def outcome(self, guesses: Guesses, plan: Plan, choices: Sequence[Choice]) -> list[int]:
        """Tell the draft; for each request of the plan how many of its drafts were kept."""
        kept_of = {c.request.id: len(c.tokens) - 1 for c in choices if not c.child}
        looked_at = dict.fromkeys(guesses.places, 0)
        kept = []
        for request, drafts in zip(plan.requests, plan.num_drafts.tolist(), strict=True):
            kept.append(kept_of.get(request.id, 0))
            if request.id in looked_at:
                looked_at[request.id] = drafts
        try:
            for id, drafts in looked_at.items():
                self.draft.accepted(id, drafts, kept_of.get(id, 0))
        except Exception as error:
            self._warn(error)
        self.drafted += sum(looked_at.values())
        self.accepted += sum(kept)
        return kept

    def release(self, request: Request) -> None:
        try:
            self.draft.release(request.id)
        except Exception as error:
            self._warn(error)

    def _checked(self, tokens: list[int], count: int, request: DraftRequest) -> list[int]:
        if not 0 <= count <= request.max_drafts or len(tokens) != count:
            raise ValueError(
                f"{count} drafts were proposed where up to {request.max_drafts} were asked for"
            )
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise ValueError(
                f"drafts {tokens} are not all of the vocabulary of {self.vocab_size} tokens"
            )
        return tokens

    def _warn(self, error: Exception) -> None:
        warnings.warn(
            f"{type(self.draft).__name__} failed, this step goes without drafts: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=4,
        )
