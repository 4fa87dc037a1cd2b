"""What guesses the next tokens for speculative decoding, as the engine sees it.

A *draft* proposes up to γ tokens for each sequence; the target model looks at all of them in one
pass and keeps a prefix, so that what comes out has exactly the target's distribution (Leviathan,
Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", 2023,
arXiv:2211.17192; :func:`pumice.ops.speculative_verify`). A bad draft costs time, never quality.

For each step the engine calls::

    proposal = draft.propose(requests)             # never fails for lack of memory: proposes less
    ... one forward pass of the target over the last token and the drafts of each sequence ...
    draft.accepted(id, num_drafts, num_accepted)   # for each request, also where both are 0
    draft.release(id)                              # when a request has finished or was cancelled
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pumice.decode.draft_tree import TreeDraft
    from pumice.decode.request import SamplingParams

__all__ = ["Draft", "DraftRequest", "Proposal", "check_vocabulary"]


@dataclass(frozen=True)
class DraftRequest:
    """A sequence that wants drafts.

    ``tokens``: prompt and what was generated so far, all of it decided. From call to call those of
    one ``id`` only grow. ``max_drafts``: no more than so many can be used (the end of the request
    is near, blocks are short); 0 is allowed. ``params``: how the target's tokens are chosen.
    ``seed``: of this sequence's draws (several samples of one request differ in it), from which a
    draft that draws tokens makes a seed of its own; None: any.
    """

    id: int
    tokens: Sequence[int]
    max_drafts: int
    params: SamplingParams
    seed: int | None = None


@dataclass(frozen=True)
class Proposal:
    """Drafts of B sequences: what :func:`pumice.ops.speculative_verify` takes, on any device.

    ``tokens``: int64 [B, γ], of which row b holds ``num_drafts[b]``, then any tokens.
    ``num_drafts``: int32 [B].
    ``probs``: fp32 [B, γ, V], from which each token was drawn; None: the draft knew no alternative
    (q is 1 at the token).
    """

    tokens: Tensor
    num_drafts: Tensor
    probs: Tensor | None = None

    @staticmethod
    def of(drafts: Sequence[Sequence[int]]) -> Proposal:
        """Ragged lists of certain tokens."""
        width = max(map(len, drafts), default=0)
        rows = [[*row, *[0] * (width - len(row))] for row in drafts]
        return Proposal(
            torch.tensor(rows, dtype=torch.int64).view(len(drafts), width),
            torch.tensor([len(row) for row in drafts], dtype=torch.int32),
        )


class Draft(ABC):
    """Proposes tokens. One draft serves one engine: it keeps state for each id.

    ``vocab_size``: of the tokens and probabilities it proposes; None where it only repeats tokens
    that it was shown. ``max_drafts``: it never proposes more at a time.
    """

    vocab_size: int | None = None
    max_drafts: int

    @abstractmethod
    def propose(self, requests: Sequence[DraftRequest]) -> Proposal:
        """Drafts that continue each request's tokens, at most its ``max_drafts`` (maybe none)."""

    # Not abstract: a draft without state, or that learns nothing from the outcome, has no use for
    # them.

    def accepted(self, id: int, num_drafts: int, num_accepted: int) -> None:  # noqa: B027
        """Of ``num_drafts`` tokens proposed for a request the first ``num_accepted`` were kept."""

    def release(self, id: int) -> None:  # noqa: B027
        """Forget a request. One that is unknown, or was released before, is no error."""


def check_vocabulary(draft: Draft | TreeDraft, vocab_size: int) -> None:
    """Raise ValueError where a draft's tokens are not the target's."""
    if draft.vocab_size is not None and draft.vocab_size != vocab_size:
        raise ValueError(
            f"{type(draft).__name__}: the draft has a vocabulary of {draft.vocab_size} tokens, but "
            f"the target of {vocab_size}; they must have one tokenizer and one size of logits"
        )
