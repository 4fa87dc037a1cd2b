"""The engine's side of speculative decoding: asks a draft, tells it what came of it.

A draft may be anybody's code, and is only there to save time: where it raises, or proposes what
cannot be, its step goes without, after a RuntimeWarning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from pumice.decode.draft import Draft, DraftRequest, Proposal, check_vocabulary
from pumice.decode.draft_tree import Tree, TreeDraft
from pumice.decode.request import Request
from pumice.decode.sampler import Choice, Guesses
from pumice.decode.scheduler import Plan, Scheduler

__all__ = ["Drafting"]


class Drafting:
    """One draft, for one engine. ``drafted`` tokens were looked at, ``accepted`` of them kept.

    Raises ValueError for a draft with another vocabulary.
    """

    def __init__(self, draft: Draft | TreeDraft, vocab_size: int) -> None:
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
        most = room // len(requests)  # of each request
        draft = self.draft
        if not isinstance(draft, TreeDraft):
            most = min(most, draft.max_drafts)
        asked = [
            DraftRequest(r.id, r.tokens, min(r.remaining - 1, most), r.params, r.seed)
            for r in requests
        ]
        try:
            if isinstance(draft, TreeDraft):
                return self._trees(draft.propose(asked), asked, most)
            return self._chains(draft.propose(asked), asked)
        except Exception as error:
            self._warn(error)
            return None

    def outcome(self, guesses: Guesses, plan: Plan, choices: Sequence[Choice]) -> list[list[int]]:
        """Tell the draft; for each request of the plan which of its drafts were kept."""
        kept_of = {c.request.id: c.kept for c in choices if not c.child}
        looked_at = dict.fromkeys(guesses.tokens, 0)
        kept = []
        for request, drafts in zip(plan.requests, plan.num_drafts.tolist(), strict=True):
            kept.append(kept_of.get(request.id, []))
            if request.id in looked_at:
                looked_at[request.id] = drafts
        try:
            for id, drafts in looked_at.items():
                self.draft.accepted(id, drafts, len(kept_of.get(id, [])))
        except Exception as error:
            self._warn(error)
        self.drafted += sum(looked_at.values())
        self.accepted += sum(map(len, kept))
        return kept

    def release(self, request: Request) -> None:
        try:
            self.draft.release(request.id)
        except Exception as error:
            self._warn(error)

    def _chains(self, proposal: Proposal, asked: Sequence[DraftRequest]) -> Guesses:
        counts, tokens = proposal.num_drafts.tolist(), proposal.tokens.tolist()
        guesses = {}
        for request, row, count in zip(asked, tokens, counts, strict=True):
            if not 0 <= count <= request.max_drafts or len(row) < count:
                raise ValueError(
                    f"{count} drafts were proposed where up to {request.max_drafts} were asked for"
                )
            guesses[request.id] = row[:count]
            self._check_tokens(row[:count])
        return Guesses(guesses, proposal, {r.id: i for i, r in enumerate(asked)})

    def _trees(self, trees: Sequence[Tree], asked: Sequence[DraftRequest], most: int) -> Guesses:
        """The first ``most`` nodes of each tree."""
        checked = {}
        for request, whole in zip(asked, trees, strict=True):
            tree = whole.first(most)
            if any(not -1 <= parent < node for node, parent in enumerate(tree.parents)):
                raise ValueError(
                    f"the parents of a tree are {tree.parents}: each must be -1 or an earlier node"
                )
            probs = [None] * len(tree) if tree.probs is None else tree.probs
            if not len(tree.tokens) == len(tree.parents) == len(probs) or any(
                p is not None and p.shape != (self.vocab_size,) for p in probs
            ):
                raise ValueError(
                    "a tree needs as many parents as tokens, and probs, if any, of "
                    f"[{self.vocab_size}] for each"
                )
            if max(tree.depths(), default=0) > request.max_drafts:
                raise ValueError(
                    f"a tree is {max(tree.depths())} deep where up to {request.max_drafts} drafts "
                    "were asked for"
                )
            self._check_tokens(tree.tokens)
            checked[request.id] = tree
        return Guesses({id: tree.tokens for id, tree in checked.items()}, trees=checked)

    def _check_tokens(self, tokens: list[int]) -> None:
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise ValueError(
                f"drafts {tokens} are not all of the vocabulary of {self.vocab_size} tokens"
            )

    def _warn(self, error: Exception) -> None:
        warnings.warn(
            f"{type(self.draft).__name__} failed, this step goes without drafts: "
            f"{type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=4,
        )
