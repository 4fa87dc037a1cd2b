"""Which weights stay: a share of all, or n of every m neighbours.

Masks are made from *scores*, one for each weight: the smallest go. Every mask is exact (the number
of weights that go is the one asked for) and deterministic: of equal scores the one of the earlier
column, and in one column of the earlier row, goes first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

# The share of weights that become zero: one number, or one for each name pattern of layers.
Ratio = float | Mapping[str, float]

_PATTERN = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class NofM:
    """Of every ``of`` neighbouring inputs each output *keeps* ``kept``: 2:4, 4:8, 1:4, …

    The first number counts what is kept, as hardware and Zhou et al. ("Learning N:M fine-grained
    structured sparse neural networks from scratch", 2021) count; SparseGPT's code and
    llm-compressor count the zeros. For 2:4 and 4:8 it is the same.
    """

    kept: int
    of: int

    @classmethod
    def parse(cls, text: object, who: str) -> NofM:
        """ "2:4" as a pattern; ValueError, naming ``who``, if it is none."""
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                f"{who}: pattern must be like '2:4' (2 of every 4 inputs are kept), not {text!r}"
            )
        kept, of = int(match[1]), int(match[2])
        if not 1 <= kept < of:
            raise ValueError(
                f"{who}: pattern {text!r} must keep at least 1 of every {of} inputs, and fewer "
                f"than all {of}"
            )
        return cls(kept, of)

    @property
    def ratio(self) -> float:
        """The share of zeros."""
        return 1 - self.kept / self.of

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"


# How much of one layer becomes zero.
Amount = float | NofM


def check_ratio(ratio: object, who: str) -> None:
    """TypeError or ValueError, naming ``who``, unless it is a number in [0, 1)."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"{who}: ratio must be a number, not {ratio!r}")
    if not 0 <= ratio < 1:
        raise ValueError(
            f"{who}: ratio, the share of weights that become zero, must be in [0, 1), not {ratio}"
        )


def ratio_of(ratios: Ratio, layer: str, who: str) -> float:
    """The ratio of a layer: that of the first pattern its name, or the last part of it, matches."""
    if not isinstance(ratios, Mapping):
        return ratios
    last = layer.rpartition(".")[2]
    for pattern, ratio in ratios.items():
        if fnmatchcase(layer, pattern) or fnmatchcase(last, pattern):
            return ratio
    raise ValueError(
        f"{who}: no pattern of ratio fits layer {layer!r}, only {', '.join(ratios)}; add '*' for "
        "the rest, or exclude the layer"
    )


def check_columns(amount: Amount, k: int, who: str) -> None:
    """ValueError unless the columns of a layer can be divided into whole groups of m."""
    if isinstance(amount, NofM) and k % amount.of:
        raise ValueError(
            f"{who}: pattern {amount} needs a multiple of {amount.of} inputs, but the layer has "
            f"{k}; exclude it, or prune it by a ratio"
        )


def keep(score: Tensor, amount: Amount, *, by_row: bool = True) -> Tensor:
    """Which weights stay: bool, of the shape of ``score`` [N, K].

    Args:
        score: any floating dtype, no NaN.
        amount: a share of zeros, or n of m along K (K a multiple of m).
        by_row: for a share: whether the weights of each row compete among themselves, so that every
            row ends with the same number, or all of the matrix do.
    """
    if isinstance(amount, NofM):
        return keep_n_of_m(score, amount)
    if by_row:
        return ~smallest(score, zeros_of(amount, score.shape[1]))
    flat = score.T.reshape(1, -1)  # by columns, for the order of equal scores
    dropped = smallest(flat, zeros_of(amount, score.numel()))
    return ~dropped.view(score.shape[1], score.shape[0]).T.contiguous()


def keep_n_of_m(score: Tensor, pattern: NofM) -> Tensor:
    """The n largest of every m neighbours in a row: bool [N, K]."""
    groups = score.reshape(-1, pattern.of)
    return ~smallest(groups, pattern.of - pattern.kept).view(score.shape)


def smallest(score: Tensor, count: int) -> Tensor:
    """Where the ``count`` smallest of each row are, of equal ones the first: bool [N, K]."""
    if not count:
        return torch.zeros_like(score, dtype=torch.bool)
    # Selected, not sorted: a sixth of the time where all weights of a layer compete.
    limit = score.topk(count, dim=1, largest=False, sorted=False).values.amax(1, keepdim=True)
    below, equal = score < limit, score == limit
    room = count - below.sum(1, keepdim=True)
    return below | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))


def zeros_of(ratio: float, count: int) -> int:
    """The number of zeros among ``count`` weights: the nearest to ratio · count, halves up."""
    return int(ratio * count + 0.5)


def check_n_of_m(weight: Tensor, pattern: NofM, who: str) -> None:
    """ValueError, naming row and group, if a group of m holds more than n nonzeros.

    −0.0 is a zero.
    """
    check_columns(pattern, weight.shape[1], who)
    counts = (weight != 0).unflatten(1, (-1, pattern.of)).sum(2)
    wrong = counts > pattern.kept
    if bool(wrong.any()):
        row, group = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{who} is not {pattern}: row {row}, group {group} (columns {group * pattern.of} … "
            f"{(group + 1) * pattern.of - 1}) holds {int(counts[row, group])} nonzeros; "
            f"{int(wrong.sum())} groups of {wrong.numel()} are like it"
        )
