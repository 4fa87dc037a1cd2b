"""What :class:`pumice.nn.Sparse24Linear` accepts beside :mod:`pumice.nn._checks`: places."""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "Sparse24Linear"


def check_columns(in_features: int) -> None:
    if in_features % 4 != 0:
        raise ValueError(
            f"{NAME}: in_features must be a multiple of 4, whole groups of four, not {in_features}"
        )


def check_metadata(metadata: Tensor, k: int) -> None:
    """Sparse tensor cores take two places that ascend; anything else is undefined."""
    places = torch.stack([metadata >> 2 * i & 3 for i in range(4)], dim=-1).view(
        len(metadata), -1, 2
    )
    wrong = (places[..., 0] >= places[..., 1]).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        where = f"columns {4 * group} to {4 * group + 3}" if 4 * group < k else "beyond K"
        raise ValueError(
            f"{NAME}: metadata, row {row}, group {group} ({where}) holds the places "
            f"{places[row, group].tolist()}; two that ascend are wanted"
        )


def check_kept(mask: Tensor, *, exactly_two: bool) -> None:
    kept = mask.view(mask.shape[0], -1, 4).sum(-1)
    wrong = (kept != 2 if exactly_two else kept > 2).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        why = (
            "with floating zeros, for which no q means a weight of zero, exactly two are needed"
            if exactly_two
            else "at most two may be"
        )
        raise ValueError(
            f"{NAME}: mask, row {row}, group {group} (columns {4 * group} to {4 * group + 3}) "
            f"keeps {int(kept[row, group])} weights; {why}"
        )


def filled_codes(
    q: Tensor, mask: Tensor, zeros: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """q where the mask is set, elsewhere what means a weight of zero."""
    if bits < 8 and bool((q[mask] >= 2**bits).any()):
        raise ValueError(f"{NAME}: q holds values beyond {2**bits - 1}, the largest of {bits} bits")
    if zeros is None:
        return torch.where(mask, q, 1 << (bits - 1))
    if zeros.is_floating_point():
        return q
    size = q.shape[1] if group_size == -1 else group_size
    spread = zeros.repeat_interleave(size, dim=1)[:, : q.shape[1]]
    return torch.where(mask, q, spread)
