"""Drafts that branch: several guesses at a time, of which the target follows the best.

A chain is worth no more than its first wrong token. A tree tries alternatives where they are
likely, and one pass of the target looks at all of its nodes (SpecInfer, Miao et al., 2024,
arXiv:2305.09781; :func:`pumice.ops.speculative_verify_tree`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pumice.decode.draft import DraftRequest
from pumice.decode.draft_ngram import NgramIndex

__all__ = ["NgramTreeDraft", "Tree", "TreeDraft"]

ROOT = -1


@dataclass
class Tree:
    """Guesses that follow a sequence's last token, the root.

    Node i guesses ``tokens[i]`` after node ``parents[i]`` < i, or after the root where that is -1.
    ``probs``: for each node fp32 [V], from which its token was drawn, given its elder siblings;
    None: no token was drawn (q is 1 at the token).
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: list[Tensor] | None = None

    def add(self, token: int, parent: int) -> int:
        """The new node, or the one that guesses the same there already."""
        for node, (other, above) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if (other, above) == (token, parent):
                return node
        self.tokens.append(token)
        self.parents.append(parent)
        return len(self.tokens) - 1

    def depths(self) -> list[int]:
        """1 for the children of the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    def ancestors(self) -> list[list[int]]:
        """For each node those above it and itself, the root left out."""
        above: list[list[int]] = []
        for node, parent in enumerate(self.parents):
            above.append([node] if parent == ROOT else [*above[parent], node])
        return above

    def first(self, count: int) -> Tree:
        """The tree of the first so many nodes."""
        probs = None if self.probs is None else self.probs[:count]
        return Tree(self.tokens[:count], self.parents[:count], probs)

    def follow(self, likeliest: Sequence[int]) -> list[int]:
        """The path of nodes that guess right, where ``likeliest`` comes after the root, then after
        each node."""
        path: list[int] = []
        at = ROOT
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if parent == at and token == likeliest[at + 1]:
                path.append(node)
                at = node
        return path

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.parents) - 1))

    def __len__(self) -> int:
        return len(self.tokens)


class TreeDraft(ABC):
    """Proposes trees; otherwise as :class:`~pumice.decode.Draft`.

    ``max_drafts`` of a request limits the depth. ``max_nodes``: no tree has more. Where there is no
    room for a whole tree only its first nodes are looked at: the best guesses come first.
    """

    vocab_size: int | None = None
    max_nodes: int

    @abstractmethod
    def propose(self, requests: Sequence[DraftRequest]) -> list[Tree]:
        """A tree for each request, which may be empty."""

    # Not abstract: as of Draft.

    def accepted(self, id: int, num_drafts: int, num_accepted: int) -> None:  # noqa: B027
        """Of ``num_drafts`` nodes that were looked at a path of ``num_accepted`` was kept."""

    def release(self, id: int) -> None:  # noqa: B027
        """Forget a request. One that is unknown, or was released before, is no error."""


class NgramTreeDraft(TreeDraft):
    """Proposes what followed several earlier occurrences of the text's end.

    The longest n-gram comes first, of one n the latest occurrence; as
    :class:`~pumice.decode.NgramDraft`, with ``branches`` continuations of ``depth`` tokens each
    (common beginnings are one branch).
    """

    def __init__(
        self, branches: int = 3, depth: int = 6, *, max_ngram: int = 4, min_ngram: int = 1
    ) -> None:
        if branches < 1 or depth < 1:
            raise ValueError(
                f"NgramTreeDraft: branches and depth must be at least 1, not {branches} and {depth}"
            )
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(
                f"NgramTreeDraft: 1 <= min_ngram <= max_ngram must hold, not {min_ngram} and "
                f"{max_ngram}"
            )
        self.branches = branches
        self.depth = depth
        self.max_ngram = max_ngram
        self.min_ngram = min_ngram
        self.max_nodes = branches * depth
        self._indices: dict[int, NgramIndex] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[Tree]:
        return [self._one(request) for request in requests]

    def _one(self, request: DraftRequest) -> Tree:
        index = self._indices.get(request.id)
        if index is None:
            index = NgramIndex(self.min_ngram, self.max_ngram, remember=self.branches)
            self._indices[request.id] = index
        index.extend(request.tokens[len(index.tokens) :])
        tree = Tree()
        for place in index.places()[: self.branches]:
            node = ROOT
            for token in index.continuation(place, min(self.depth, request.max_drafts)):
                node = tree.add(token, node)
        return tree

    def release(self, id: int) -> None:
        self._indices.pop(id, None)
