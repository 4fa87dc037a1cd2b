"""What :class:`pumice.nn.Int4Linear` accepts beside :mod:`pumice.nn._checks`: its indices."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)
NAME = "Int4Linear"


def check_counts(**counts: object) -> None:
    for argument, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"{NAME}: {argument} must be an integer from 0 on, not {count!r}")


def check_permutation(perm: Tensor, k: int) -> None:
    if not torch.equal(perm.long().sort().values, torch.arange(k, device=perm.device)):
        raise ValueError(f"{NAME}: perm is not a permutation of 0 … {k - 1}")


def check_outlier_idx(outlier_idx: Tensor, k: int) -> None:
    """Each names a column of the input, and none twice, for it would be added twice."""
    if outlier_idx.numel() == 0:
        return
    low, high = int(outlier_idx.min()), int(outlier_idx.max())
    if low < 0 or high >= k:
        raise ValueError(
            f"{NAME}: outlier_idx must lie in [0, {k}), but holds {low if low < 0 else high}"
        )
    if outlier_idx.unique().numel() != outlier_idx.numel():
        raise ValueError(f"{NAME}: outlier_idx names a column twice")


def order_of(g_idx: Tensor, k: int, group_size: int) -> Tensor | None:
    """The columns sorted by group, or None where they are already."""
    if g_idx.dtype not in INTEGERS or g_idx.shape != (k,):
        raise ValueError(
            f"{NAME}: g_idx must be int32 or int64 [{k}], not {g_idx.dtype} {list(g_idx.shape)}"
        )
    size = k if group_size == -1 else group_size
    stored = torch.arange(k, device=g_idx.device) // size
    groups, order = g_idx.long().sort(stable=True)
    if not torch.equal(groups, stored):
        raise ValueError(
            f"{NAME}: g_idx must give every group {size} columns, save the last; sorted groups of "
            "other sizes cannot be stored"
        )
    return None if torch.equal(g_idx.long(), stored) else order.to(torch.int32)
