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
import numpy.typing as npt
import torch
from torch import Tensor

from pumice.decode.batch import PagedBatch
from pumice.decode.block_manager import BlockManager
from pumice.decode.draft_tree import Tree
from pumice.decode.pool import CachePool
from pumice.decode.request import SamplingParams
from pumice.decode.runner import ModelRunner
from pumice.ops.sampling import sampling_probs, speculative_verify_tree

__all__ = ["move_tokens", "tree_mask", "tree_step"]

_PADDING = -2  # as a parent


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
    tokens = [[root, *tree.tokens] for root, tree in zip(roots, trees, strict=True)]
    counts = [len(row) for row in tokens]
    step = manager.append(ids, [token for row in tokens for token in row], counts)
    try:
        batch = PagedBatch.from_step(
            runner.pool,
            step,
            tokens,
            positions=[
                [length, *(length + depth for depth in tree.depths())]
                for length, tree in zip(before, trees, strict=True)
            ],
            tree_mask=tree_mask(trees) if any(map(len, trees)) else None,
        )
        logits = runner.forward(batch)
        chosen, paths = _verify(logits, trees, params, seeds, [n + 1 for n in before])
    except BaseException:
        manager.truncate(ids, before)
        raise
    # Slots of the nodes that were accepted, before their blocks are given back.
    starts = np.cumsum([0, *counts[:-1]])
    source = np.concatenate(
        [
            step.slot_mapping[start + 1 + np.array(path, dtype=np.int64)]
            for start, path in zip(starts, paths, strict=True)
        ]
    )
    manager.truncate(ids, [length + 1 for length in before])
    kept = [row[:-1] for row in chosen]  # the last one is not computed: it is the next root
    again = manager.append(ids, [token for row in kept for token in row], [len(r) for r in kept])
    runner.pool.copy_blocks(again.copies)
    move_tokens(runner.pool, source, again.slot_mapping)
    manager.commit(ids)
    return chosen


def _verify(
    logits: Tensor,
    trees: Sequence[Tree],
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens chosen for each sequence, and the nodes that were accepted."""
    device = logits.device
    counts = torch.tensor([1 + len(tree) for tree in trees])
    probs = sampling_probs(logits, **_filters(params, counts, device))
    width = int(counts.max()) - 1
    target = probs.new_zeros(len(trees), width + 1, probs.shape[1])
    drafted = torch.zeros(len(trees), width, dtype=torch.int64)
    parents = torch.full((len(trees), width), _PADDING, dtype=torch.int32)
    drawn = any(tree.probs is not None for tree in trees)
    draft_probs = torch.zeros_like(target[:, 1:]) if drawn else None
    first = 0
    for b, tree in enumerate(trees):
        size = len(tree)
        target[b, : size + 1] = probs[first : first + size + 1]
        first += size + 1
        drafted[b, :size] = torch.tensor(tree.tokens, dtype=torch.int64)
        parents[b, :size] = torch.tensor(tree.parents, dtype=torch.int32)
        if draft_probs is not None and size:
            if tree.probs is not None:
                draft_probs[b, :size] = torch.stack(tree.probs)
            else:
                draft_probs[b, torch.arange(size), tree.tokens] = 1
    tokens, path, accepted = speculative_verify_tree(
        drafted.to(device),
        parents.to(device),
        target,
        draft_probs=draft_probs,
        seeds=torch.tensor(seeds, device=device),
        positions=torch.tensor(positions, device=device),
    )
    lengths = accepted.tolist()
    chosen = [row[: n + 1] for row, n in zip(tokens.tolist(), lengths, strict=True)]
    return chosen, [row[:n] for row, n in zip(path.tolist(), lengths, strict=True)]


def tree_mask(trees: Sequence[Tree]) -> Tensor:
    """bool [Σ (1 + nodes), most of one]: what the root and nodes see of each other.

    Queries are each sequence's root, then its nodes: the root sees itself, a node the root, its
    ancestors and itself. See ``tree_mask`` of :func:`pumice.ops.paged_attention`.
    """
    width = 1 + max(map(len, trees), default=0)
    rows = torch.zeros(sum(1 + len(tree) for tree in trees), width, dtype=torch.bool)
    rows[:, 0] = True
    row = 0
    for tree in trees:
        for node, seen in enumerate(tree.ancestors()):
            rows[row + 1 + node, [1 + other for other in seen]] = True
        row += 1 + len(tree)
    return rows


def move_tokens(
    pool: CachePool, source: npt.NDArray[np.int64], destination: npt.NDArray[np.int64]
) -> None:
    """Copy the keys and values of slots to other slots, in all layers. The two may overlap."""
    moved = source != destination
    if not moved.any():
        return
    slots = [torch.from_numpy(s[moved]).to(pool.device) for s in (source, destination)]
    with torch.no_grad():
        for cache in (*pool.key_caches, *pool.value_caches):
            # Bytes are moved as bytes: not everything can be indexed in float8.
            flat = cache.flatten(0, 1)
            flat = flat.view(torch.uint8) if flat.element_size() == 1 else flat
            flat[slots[1]] = flat[slots[0]]


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
