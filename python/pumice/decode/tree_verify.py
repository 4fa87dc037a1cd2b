"""Trees of guesses as the operators take them: what nodes see of each other, and which stay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pumice.decode.draft_tree import Tree
from pumice.ops.sampling import speculative_verify_tree

__all__ = ["tree_mask", "verify_trees"]

_PADDING = -2  # as a parent


def tree_mask(
    trees: Sequence[Tree | None], counts: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int32]:
    """What a pass's tokens see of each other: int32 [Σ counts, ceil(most of them / 32)], in bits.

    Of a sequence with a tree these are its root, which sees itself, and the nodes, which see the
    root, their ancestors and themselves. Without one (None) they are a chain of ``counts[b]``
    tokens. See ``tree_mask`` of :func:`pumice.ops.paged_attention`.
    """
    if counts is None:
        counts = np.array([1 if tree is None else 1 + len(tree) for tree in trees], np.int64)
    width = -(-int(counts.max()) // 32) * 32
    seen = np.zeros((int(counts.sum()), width), np.bool_)
    row = 0
    for tree, count in zip(trees, counts.tolist(), strict=True):
        if tree is None:
            seen[row : row + count, :count] = np.tri(count, dtype=np.bool_)
        else:
            seen[row, 0] = True
            for query, parent in enumerate(tree.parents, 1):
                seen[row + query] = seen[row + 1 + parent]
                seen[row + query, query] = True
        row += count
    return np.packbits(seen, axis=1, bitorder="little").view(np.int32)


def verify_trees(
    probs: Tensor, trees: Sequence[Tree], seeds: Tensor, positions: Tensor
) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens chosen for each sequence, and the nodes that were accepted.

    Args:
        probs: [Σ (1 + nodes), V], the target's after each root and its nodes, tree after tree.
        seeds, positions: int64 [trees], of the draws.
    """
    device = probs.device
    width = max(map(len, trees))
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
        seeds=seeds,
        positions=positions,
    )
    lengths = accepted.tolist()
    chosen = [row[: n + 1] for row, n in zip(tokens.tolist(), lengths, strict=True)]
    return chosen, [row[:n] for row, n in zip(path.tolist(), lengths, strict=True)]
