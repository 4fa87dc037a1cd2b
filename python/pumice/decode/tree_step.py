"""One pass of a model over trees of guesses, and what becomes of the cache.

Each sequence runs its last token, the root, and the nodes of its tree. A node sees its ancestors
and what came before the root, and no other branch (``tree_mask``), at the position of its depth.
Afterwards the keys and values of the accepted path lie where their nodes were; they are moved to
where a sequence without branches has them, and the rest is given back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pumice.decode.batch import PagedBatch
from pumice.decode.block_manager import BlockManager
from pumice.decode.draft_slots import keep_drafts
from pumice.decode.draft_tree import Tree
from pumice.decode.request import SamplingParams
from pumice.decode.runner import ModelRunner
from pumice.decode.tree_verify import tree_mask, verify_trees
from pumice.ops.sampling import sampling_probs

__all__ = ["tree_step"]


def tree_step(
    runner: ModelRunner,
    manager: BlockManager,
    ids: Sequence[int],
    roots: Sequence[int],
    trees: Sequence[Tree],
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
) -> list[list[int]]:
    """One pass over the trees of B sequences: the tokens that each is longer by, one at least.

    ``ids`` are sequences of ``manager`` in which everything before ``roots``, their last tokens, is
    computed. Afterwards the same holds of the last token returned, whatever was accepted.

    Raises OutOfBlocksError, changing nothing, where the pool has too few for all roots and nodes.
    """
    before = [manager.num_tokens(id) for id in ids]
    rows = [[root, *tree.tokens] for root, tree in zip(roots, trees, strict=True)]
    counts = np.array([len(row) for row in rows], np.int64)
    tokens = np.array([token for row in rows for token in row], np.int64)
    step = manager.append(ids, tokens, counts)
    try:
        mask = tree_mask(trees) if any(map(len, trees)) else None
        batch = PagedBatch.from_step(
            runner.pool,
            step,
            rows,
            positions=[
                [length, *(length + depth for depth in tree.depths())]
                for length, tree in zip(before, trees, strict=True)
            ],
            tree_mask=None if mask is None else torch.from_numpy(mask),
        )
        logits = runner.forward(batch)
        device = logits.device
        chosen, paths = verify_trees(
            sampling_probs(logits, **_filters(params, torch.from_numpy(counts), device)),
            trees,
            torch.tensor(seeds, device=device),
            torch.tensor([length + 1 for length in before], device=device),
        )
    except BaseException:
        manager.truncate(ids, before)
        raise
    # The last token chosen is not computed: it is the next root.
    moves = keep_drafts(manager, np.array(ids, np.int64), step, tokens, counts, counts - 1, paths)
    runner.pool.move_tokens(*moves)
    manager.commit(ids)
    return chosen


def _filters(params: Sequence[SamplingParams], counts: Tensor, device: torch.device) -> Any:
    """For each logits row the filters of its sequence."""

    def column(name: str, dtype: torch.dtype) -> Tensor:
        values = torch.tensor([getattr(one, name) for one in params], dtype=dtype)
        return values.repeat_interleave(counts).to(device)

    return {
        "temperature": column("temperature", torch.float32),
        "top_k": column("top_k", torch.int32),
        "top_p": column("top_p", torch.float32),
        "min_p": column("min_p", torch.float32),
    }
