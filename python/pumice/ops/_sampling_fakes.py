"""Shapes of the sampling operators, for torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.ops import _library


def _probs_fake(logits: Tensor, *parameters: Tensor | None) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


def _sample_fake(logits: Tensor, *parameters: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:1]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)


def _verify_fake(draft_tokens: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, drafts = draft_tokens.shape
    tokens = draft_tokens.new_empty((batch, drafts + 1))
    return tokens, draft_tokens.new_empty((batch,), dtype=torch.int32)


def _verify_tree_fake(draft_tokens: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    tokens, num_accepted = _verify_fake(draft_tokens)
    return tokens, draft_tokens.new_empty(draft_tokens.shape, dtype=torch.int32), num_accepted


_FAKES = {
    "sampling_probs": _probs_fake,
    "sample": _sample_fake,
    "speculative_verify": _verify_fake,
    "speculative_verify_tree": _verify_tree_fake,
}
for _name, _fake in _FAKES.items():
    _library.declare(
        _name,
        fake=_fake,
        backward=_library.not_differentiable(
            _name, "Detach its inputs; torch.softmax has the gradient of a distribution."
        ),
    )
