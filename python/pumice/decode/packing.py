"""A scheduler's plan as a batch for the model: everything in two transfers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pumice.decode.batch import PagedBatch
from pumice.decode.draft_tree import Tree
from pumice.decode.pool import CachePool
from pumice.decode.scheduler import Plan
from pumice.decode.tree_verify import tree_mask

__all__ = ["pack", "upload"]


def pack(
    plan: Plan,
    pool: CachePool,
    pad_to: int = 0,
    trees: Mapping[int, Tree] | None = None,
    mark: int | None = None,
) -> PagedBatch:
    """The batch of a forward pass; copies the blocks that the plan asks to be copied.

    ``trees``: by id of the request, where its drafts are one. Nodes stand at the position of their
    depth, and see their own branch only. ``mark``: a position at which a token of no sequence is to
    stand.

    ``pad_to``: make every pass the same to every row. It is filled up with tokens of no sequence to
    so many: they are written nowhere, and attention gives them zero. And each token is a sequence
    of its own to attention, which ends there: it sees the same keys, but has the bits of a single
    query, whatever is read with it (kernels for one query and for many round differently).
    """
    step, counts = plan.step, plan.counts
    pool.copy_blocks(step.copies)
    total = len(plan.tokens)
    ends = np.cumsum(counts)
    marks = 0 if mark is None else 1
    per_token = np.zeros((3, max(total + marks, pad_to)), np.int64)
    per_token[0, :total] = plan.tokens
    per_token[1, :total] = np.arange(total) + np.repeat(step.seq_lens - ends, counts)
    per_token[2, :total] = step.slot_mapping
    per_token[2, total:] = -1
    if mark is not None:
        per_token[1, -1] = mark
    grown = _grown(plan, trees) if trees else None
    mask = None
    if grown is not None:
        assert not pad_to
        for tree, end, length in zip(grown, ends.tolist(), step.seq_lens.tolist(), strict=True):
            if tree is not None:
                root = length - len(tree) - 1
                per_token[1, end - len(tree) : end] = root + np.array(tree.depths(), np.int64)
        seen = tree_mask(grown, counts)
        mask = upload(np.pad(seen, ((0, marks), (0, 0))), pool.device)
    lengths, table = step.seq_lens.astype(np.int64), step.block_table
    if pad_to:
        lengths, table = per_token[1, :total] + 1, np.repeat(table, counts, axis=0)
        counts = np.ones(total, np.int64)
        ends = np.cumsum(counts)
    batch, width = table.shape
    per_sequence = np.empty(batch * (width + 2) + 1, np.int32)
    per_sequence[:batch] = lengths
    per_sequence[batch] = 0
    per_sequence[batch + 1 : 2 * batch + 1] = ends
    per_sequence[2 * batch + 1 :] = table.ravel()
    tokens, sequences = upload(per_token, pool.device), upload(per_sequence, pool.device)
    return PagedBatch(
        input_ids=tokens[0],
        positions=tokens[1],
        slot_mapping=tokens[2],
        block_table=sequences[2 * batch + 1 :].view(batch, width),
        seq_lens=sequences[:batch],
        cu_seqlens_q=sequences[batch : 2 * batch + 1],
        max_seqlen_q=int(counts.max()),
        pool=pool,
        tree_mask=mask,
    )


def _grown(plan: Plan, trees: Mapping[int, Tree]) -> list[Tree | None] | None:
    """The trees that take part, request by request; None where all of them are chains."""
    grown = [
        trees.get(request.id) if drafts else None
        for request, drafts in zip(plan.requests, plan.num_drafts.tolist(), strict=True)
    ]
    return grown if any(tree is not None and not tree.is_chain for tree in grown) else None


def upload(numbers: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """An array on a device. From pinned memory the copy does not wait for running kernels."""
    tensor = torch.from_numpy(numbers)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
