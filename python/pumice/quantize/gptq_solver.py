"""GPTQ for one matrix: quantized values, grids and the order of the columns, from W and H."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pumice.quantize.grid import Grid, expand, group_length
from pumice.quantize.obs import aligned_blocks, inverse_factor, quadratic_error, sweep


@dataclass(frozen=True)
class Solution:
    """A quantized matrix; columns are in stored order (see ``perm``).

    Attributes:
        q: uint8 [N, K].
        scale: fp32 [N, G].
        zero: fp32 [N, G], integers.
        perm: int64 [K], the input of each stored column, or None where they are in order.
        rounded_rows: rows for which rounding to nearest was no worse, and was taken.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    perm: Tensor | None
    rounded_rows: int


def solve(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    group_size: int,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    block_size: int = 128,
    where: str = "the layer",
) -> Solution:
    """Quantize a matrix such that its output, not the matrix itself, changes least.

    The order of the columns matters, for the last ones find nobody left to make up for them:
    ``act_order`` begins with the inputs of most energy, the diagonal of H. Groups are then made of
    columns in that order (``perm``); or, with ``static_groups``, of neighbours, with grids that are
    fitted to the weights before anything is changed. Without either, each group's grid is fitted
    when its first column is reached, to what the weights have become by then.

    A row for which rounding to nearest, on grids fitted to the same groups of the original weights,
    gives a smaller error w.r.t. H is rounded to nearest instead: the sweep is greedy, and on rare
    rows it loses.

    Args:
        weight: fp32 [N, K], finite.
        hessian: fp32 [K, K].
        grid: how grids are fitted.
        group_size: columns that share a scale, or -1.
        damp: relative to the mean diagonal of H.
        act_order, static_groups: see above.
        block_size: columns of a lazy batch; changes nothing but speed (and rounding).
        where: names the layer in errors.

    Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for
    Generative Pre-trained Transformers", 2022.
    """
    k = weight.shape[1]
    size = group_length(group_size, k)
    order = _order(hessian) if act_order else None
    stored_in_order = order is None or static_groups
    if order is not None:
        weight_sorted, hessian_sorted = weight[:, order], hessian[order][:, order]
    else:
        weight_sorted, hessian_sorted = weight, hessian
    factor = inverse_factor(hessian_sorted, damp, where)

    # The grids of rounding to nearest, and those of static groups.
    stored = weight if stored_in_order else weight_sorted
    fixed = grid.fit_groups(stored, size)
    columns = weight_sorted.T.contiguous()
    q = torch.empty_like(columns, dtype=torch.uint8)
    scale, zero = (t.T.contiguous() for t in fixed)  # [G, N]

    def replace(j: int) -> Tensor:
        group = (j if order is None or not static_groups else int(groups[j])) // size
        if not static_groups and j % size == 0:
            scale[group], zero[group] = grid.fit(columns[j : j + size].T.contiguous())
        values = grid.quantize(columns[j], scale[group], zero[group])
        q[j] = values
        return values.sub_(zero[group]).mul_(scale[group])

    groups = order.cpu() if order is not None else torch.arange(k)
    blocks = aligned_blocks(k, 1 if static_groups else size, block_size)
    sweep(columns, factor, blocks, replace)

    q, columns = q.T, columns.T
    if order is not None and static_groups:  # back to the order of the inputs
        back = torch.empty_like(order)
        back[order] = torch.arange(k, device=order.device)
        q, columns = q[:, back], columns[:, back]
    scale, zero = scale.T, zero.T

    # Rows for which rounding to nearest is better.
    h = hessian if stored_in_order else hessian_sorted
    wide_scale, wide_zero = (expand(t, size, k) for t in fixed)
    nearest = grid.quantize(stored, wide_scale, wide_zero)
    nearest_error = quadratic_error((nearest - wide_zero).mul_(wide_scale).sub_(stored), h)
    better = nearest_error < quadratic_error(columns - stored, h)
    q = torch.where(better[:, None], nearest.to(torch.uint8), q)
    return Solution(
        q.contiguous(),
        torch.where(better[:, None], fixed[0], scale).contiguous(),
        torch.where(better[:, None], fixed[1], zero).contiguous(),
        None if stored_in_order else order,
        int(better.sum()),
    )


def _order(hessian: Tensor) -> Tensor:
    """Columns by falling energy; stable, so that equal ones keep their places on every device."""
    return hessian.diagonal().sort(descending=True, stable=True).indices
