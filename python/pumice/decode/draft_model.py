"""Drafts by a second, cheaper model with the target's vocabulary, one token after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pumice.decode.draft import DraftRequest, Proposal
from pumice.decode.draft_cache import DraftCache, Row
from pumice.decode.gamma import AdaptiveGamma, PacedDraft
from pumice.decode.request import SamplingParams
from pumice.ops.sampling import sampling_probs, speculative_verify

__all__ = ["ModelDraft", "draw", "filters"]


class ModelDraft(PacedDraft):
    """Any causal language model with the target's vocabulary as a draft.

    Tokens are drawn from its distribution, filtered as the request's own are (temperature, top-k,
    top-p, min-p): the closer p and q are, the more is kept. Where all requests are greedy, so is
    the draft, and it makes no probabilities.

    Args:
        model: what :class:`~pumice.decode.ModelRunner` takes, on the target's device.
        gamma: tokens to draft at a time, or an :class:`~pumice.decode.AdaptiveGamma`.
        options: ``num_blocks`` (1024), ``block_size`` (16), ``cache_dtype`` (that of the model's
            keys): the draft's own cache. A request that finds no room in it gets no drafts, and
            decodes as it would without. ``max_batch_tokens`` (2048): of one forward pass; longer
            prompts are caught up with in several. ``prefix_cache`` (True): find prompts' common
            beginnings, as the engine does.

    Attributes:
        cache: the :class:`~pumice.decode.draft_cache.DraftCache`. record: what was accepted.
    """

    def __init__(self, model: nn.Module, gamma: int | AdaptiveGamma = 4, **options: Any) -> None:
        super().__init__(gamma)
        self.cache = DraftCache(model, **options)
        self.vocab_size = self.cache.runner.vocab_size

    def draft(self, requests: Sequence[DraftRequest], limits: Sequence[int]) -> Proposal:
        rows = self.cache.admit(requests, limits)
        if not rows:
            return Proposal.of([[] for _ in requests])
        device = self.cache.runner.device
        counts = torch.zeros(len(requests), dtype=torch.int32)
        for row in rows:
            counts[row.index] = row.limit
        width = max(row.limit for row in rows)
        tokens = torch.zeros(len(requests), width, dtype=torch.int64, device=device)
        probs = None
        if any(row.request.params.temperature > 0 for row in rows):
            probs = torch.zeros(len(requests), width, self.cache.runner.vocab_size, device=device)
        logits = self.cache.catch_up(rows)
        for k in range(width):
            places = torch.tensor([row.index for row in rows], device=device)
            if probs is None:
                drawn = logits.argmax(-1)
            else:
                probs[places, k] = sampling_probs(
                    logits, **filters([row.request.params for row in rows], device)
                )
                drawn = draw(probs[places, k], *_key(rows, k))
            tokens[places, k] = drawn
            going_on = [i for i, row in enumerate(rows) if k + 1 < row.limit]
            if going_on:
                guesses = drawn.tolist()
                rows = [rows[i] for i in going_on]
                logits = self.cache.guess(rows, [guesses[i] for i in going_on])
        return Proposal(tokens, counts.to(device), probs)

    def release(self, id: int) -> None:
        super().release(id)
        self.cache.release(id)


def filters(params: Sequence[SamplingParams], device: torch.device) -> dict[str, Tensor]:
    """The parameters of each row as :func:`pumice.ops.sampling_probs` takes them."""
    return {
        "temperature": torch.tensor([float(p.temperature) for p in params], device=device),
        "top_k": torch.tensor([p.top_k for p in params], dtype=torch.int32, device=device),
        "top_p": torch.tensor([float(p.top_p) for p in params], device=device),
        "min_p": torch.tensor([float(p.min_p) for p in params], device=device),
    }


def draw(probs: Tensor, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """A token for each row of probs [R, V], which is what it is drawn from to the last bit."""
    # Verification without drafts is sampling; from probabilities, not from logits.
    none = torch.empty(len(probs), 0, dtype=torch.int64, device=probs.device)
    tokens, _ = speculative_verify(
        none,
        probs[:, None],
        seeds=torch.tensor(seeds, device=probs.device),
        positions=torch.tensor(positions, device=probs.device),
    )
    return tokens[:, 0]


def _key(rows: Sequence[Row], k: int) -> tuple[list[int], list[int]]:
    """Seeds and positions of the k-th draft."""
    return [row.sequence.seed for row in rows], [len(row.request.tokens) + k for row in rows]
