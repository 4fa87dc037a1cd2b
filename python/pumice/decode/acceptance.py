"""How often drafts are kept, and what that is worth.

Where each draft is kept with probability α, independently, a pass of the target over γ drafts
yields them up to the first that is rejected, and one token of the target's own (Leviathan et al.,
2023, equation 1):

    E[tokens] = 1 + α + … + α^γ = (1 − α^(γ+1)) / (1 − α).

A token drawn from q is kept with probability β = Σ_x min(p(x), q(x)); α is the mean of β over the
contexts that come up (section 3.2). Contexts are not independent in truth: where text is easy a
whole run of drafts is kept, so a model's tokens a pass lie somewhat above the formula.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Acceptance", "expected_tokens", "overlap"]


def expected_tokens(acceptance: float, num_drafts: float) -> float:
    """Tokens a pass of the target yields with ``num_drafts`` drafts: (1 − α^(γ+1)) / (1 − α)."""
    if not 0 <= acceptance <= 1:
        raise ValueError(f"expected_tokens: acceptance must be in [0, 1], not {acceptance}")
    if acceptance == 1:
        return num_drafts + 1
    return float((1 - acceptance ** (num_drafts + 1)) / (1 - acceptance))


def overlap(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """β = Σ_x min(p(x), q(x)) over the last dimension: how likely a draft drawn from q is kept."""
    if target_probs.shape != draft_probs.shape:
        raise ValueError(
            f"overlap: target_probs and draft_probs must have one shape, not "
            f"{tuple(target_probs.shape)} and {tuple(draft_probs.shape)}"
        )
    return torch.minimum(target_probs, draft_probs).sum(-1)


@dataclass
class Acceptance:
    """Counts of verified drafts. A pass tests its drafts up to the first that it rejects.

    ``passes`` of the target over a sequence proposed ``drafted`` tokens, of which ``tested`` were
    judged and ``accepted`` kept. ``memory``: weigh the past by 1 - 1/memory with each pass, so that
    the counts (no longer whole) follow a change of text; None counts everything alike.
    """

    memory: float | None = None
    passes: float = 0
    drafted: float = 0
    tested: float = 0
    accepted: float = 0

    def update(self, num_drafts: int, num_accepted: int) -> None:
        if not 0 <= num_accepted <= num_drafts:
            raise ValueError(
                f"Acceptance: num_accepted must be in [0, num_drafts = {num_drafts}], not "
                f"{num_accepted}"
            )
        kept = 1.0 if self.memory is None else 1 - 1 / self.memory
        self.passes = kept * self.passes + 1
        self.drafted = kept * self.drafted + num_drafts
        self.tested = kept * self.tested + num_accepted + (num_accepted < num_drafts)
        self.accepted = kept * self.accepted + num_accepted

    @property
    def rate(self) -> float:
        """α by maximum likelihood: of the drafts that were tested, those accepted; NaN if none."""
        return self.accepted / self.tested if self.tested else float("nan")

    def rate_given(self, prior: float, weight: float) -> float:
        """α where ``weight`` tests that gave ``prior`` are added to those seen."""
        return (self.accepted + weight * prior) / (self.tested + weight)

    @property
    def tokens_per_pass(self) -> float:
        """Drafts kept, and the target's own token, for each pass; NaN before the first."""
        return 1 + self.accepted / self.passes if self.passes else float("nan")

    @property
    def drafts_per_pass(self) -> float:
        return self.drafted / self.passes if self.passes else float("nan")
