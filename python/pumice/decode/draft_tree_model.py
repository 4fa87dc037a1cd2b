"""Trees by a draft model: at every depth some alternatives, each continued on its own.

In the draft's cache a branch is a fork of its sequence: branches share the blocks of what they have
in common, and copy the last one when they part (copy on write).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pumice.decode.block_manager import OutOfBlocksError
from pumice.decode.draft import DraftRequest
from pumice.decode.draft_cache import DraftCache, Row, mix
from pumice.decode.draft_model import draw, filters
from pumice.decode.draft_tree import ROOT, Tree, TreeDraft
from pumice.ops.sampling import sampling_probs

__all__ = ["ModelTreeDraft"]


@dataclass
class _Leaf:
    """A node whose children are wanted; ``id``: the sequence in the cache that ends with it."""

    row: Row
    tree: Tree
    node: int
    id: int
    children: int = 0

    def child(self, token: int, probs: Tensor | None = None) -> _Leaf:
        """A new child, drawn from probs."""
        self.children += 1
        node = self.tree.add(token, self.node)
        if probs is not None:
            self.tree.probs = [*(self.tree.probs or []), probs]
        return _Leaf(self.row, self.tree, node, self.id)

    def number(self, width: int) -> int:
        """Of the next child, other than that of any other node at its depth."""
        return (self.node + 1) * (width + 1) + self.children


class ModelTreeDraft(TreeDraft):
    """A tree whose nodes at depth d have ``widths[d]`` children, by a draft model.

    Greedy requests get the most probable tokens of each node. Others get tokens drawn from the
    draft's distribution, filtered as the request's are, without replacement: the second child is
    drawn from what is left of q without the first (recursive rejection sampling, Jeon et al., 2024,
    arXiv:2402.14160), which keeps more of them than the most probable tokens would where
    distributions are flat.

    Args:
        model: as for :class:`~pumice.decode.ModelDraft`, and so are the options.
        widths: children of the root, of these, and so on. (3, 1, 1) are three chains of three,
            (1, 1, 1, 1) is one of four.
    """

    def __init__(
        self, model: nn.Module, widths: Sequence[int] = (3, 2, 1, 1), **options: Any
    ) -> None:
        if not widths or min(widths) < 1:
            raise ValueError(f"ModelTreeDraft: widths must be numbers from 1 on, not {widths}")
        self.widths = tuple(widths)
        self.cache = DraftCache(model, **options)
        self.vocab_size = self.cache.runner.vocab_size
        self.max_nodes, level = 0, 1
        for width in self.widths:
            level *= width
            self.max_nodes += level

    def propose(self, requests: Sequence[DraftRequest]) -> list[Tree]:
        trees = [Tree() for _ in requests]
        depths = [min(request.max_drafts, len(self.widths)) for request in requests]
        rows = self.cache.admit(requests, [min(depth, 1) for depth in depths])
        if not rows:
            return trees
        leaves = [_Leaf(row, trees[row.index], ROOT, row.sequence.id) for row in rows]
        logits = self.cache.catch_up(rows)
        forks: list[int] = []
        try:
            for depth, width in enumerate(self.widths):
                children = self._grow(leaves, logits, depth, width)
                leaves = [leaf for leaf in children if depth + 1 < depths[leaf.row.index]]
                if not leaves:
                    break
                ids = self.cache.manager.fork([leaf.id for leaf in leaves]).tolist()
                forks += ids
                for leaf, id in zip(leaves, ids, strict=True):
                    leaf.id = id
                logits = self.cache.forward(ids, [[leaf.tree.tokens[leaf.node]] for leaf in leaves])
        except OutOfBlocksError:
            pass  # what has grown so far is a tree too
        finally:
            self.cache.manager.free(forks)
        return trees

    def release(self, id: int) -> None:
        self.cache.release(id)

    def _grow(self, leaves: list[_Leaf], logits: Tensor, depth: int, width: int) -> list[_Leaf]:
        """Add children to the nodes that logits [leaves, V] came from."""
        greedy = [i for i, leaf in enumerate(leaves) if leaf.row.request.params.temperature == 0]
        warm = [i for i, leaf in enumerate(leaves) if leaf.row.request.params.temperature > 0]
        children = []
        best = logits[greedy].topk(min(width, logits.shape[1]), dim=-1).indices.tolist()
        for i, tokens in zip(greedy, best, strict=True):
            children += [leaves[i].child(token) for token in tokens]
        return children + self._draw([leaves[i] for i in warm], logits[warm], depth, width)

    def _draw(self, leaves: list[_Leaf], logits: Tensor, depth: int, width: int) -> list[_Leaf]:
        """Children drawn one after the other, each from q without those before it."""
        children: list[_Leaf] = []
        if not leaves:
            return children
        params = [leaf.row.request.params for leaf in leaves]
        q = sampling_probs(logits, **filters(params, logits.device))
        for _ in range(width):
            # Each node of a tree has a number of its own; the position tells one tree from another.
            seeds = [mix(leaf.row.sequence.seed ^ mix(leaf.number(width))) for leaf in leaves]
            drawn = draw(q, seeds, [len(leaf.row.request.tokens) + depth for leaf in leaves])
            for leaf, row, token in zip(leaves, q, drawn.tolist(), strict=True):
                children.append(leaf.child(token, row))
            rest = q.scatter(1, drawn[:, None], 0)
            mass = rest.sum(1)
            left = [i for i, one in enumerate(mass.tolist()) if one > 0]
            leaves = [leaves[i] for i in left]
            if not leaves:
                break
            q = rest[left] / mass[left, None]
        return children
