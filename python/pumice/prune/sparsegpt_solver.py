"""SparseGPT for one matrix: which weights go, what the others become, and on which grid.

The loop, the factor and the lazy batches are those of GPTQ (:mod:`pumice.quantize.obs`). To set a
weight to zero costs w² / [H⁻¹]_jj = (w / U_jj)², where H⁻¹ is the inverse over the columns not yet
visited. By this the mask is chosen for a block of columns when the sweep reaches it, so that it
counts with what earlier zeros did to later weights; of an n:m pattern for every m columns anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pumice.prune.pattern import Amount, NofM, keep_n_of_m, smallest, zeros_of
from pumice.quantize.grid import Grid, group_length
from pumice.quantize.obs import aligned_blocks, inverse_factor, sweep


@dataclass(frozen=True)
class Part:
    """Rows of a matrix that are pruned by one amount; for a ratio they compete with each other."""

    rows: int
    amount: Amount


@dataclass(frozen=True)
class Integers:
    """What a matrix was rounded to: W = (q - zero) · scale.

    Attributes:
        q: uint8 [N, K], the zero point where a weight is gone.
        scale, zero: fp32 [N, G], the zeros integers.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Solution:
    """A pruned matrix, and its integers where it was quantized in the same sweep.

    Attributes:
        weight: fp32 [N, K].
        kept: bool [N, K]; elsewhere the weight is zero. A kept weight may be rounded to zero.
        integers: or None.
    """

    weight: Tensor
    kept: Tensor
    integers: Integers | None = None

    def rows(self, start: int, stop: int) -> Solution:
        """Some rows of it."""
        some = slice(start, stop)
        whole = self.integers
        return Solution(
            self.weight[some],
            self.kept[some],
            whole and Integers(whole.q[some], whole.scale[some], whole.zero[some]),
        )


def solve(
    weight: Tensor,
    hessian: Tensor,
    parts: Sequence[Part],
    *,
    damp: float = 0.01,
    block_size: int = 128,
    grid: Grid | None = None,
    group_size: int = -1,
    where: str = "the layer",
) -> Solution:
    """Prune a matrix, and quantize what is kept, such that its output changes least.

    For a column j each row keeps its weight or loses it, and with a ``grid`` rounds what it keeps;
    the columns after it make up for both, in one sweep::

        ŵ_j = kept_j · round(w_j)        e = (w_j - ŵ_j) / U_jj        w_k -= e · U_jk   for k > j

    A group's grid is fitted when its first column is reached, to the weights that (as things then
    stand) will be kept.

    Args:
        weight: fp32 [N, K], finite.
        hessian: fp32 [K, K], of the layer's inputs. Inputs that were never active go first.
        parts: consecutive rows and how much of them goes. A ratio is met exactly by each part, and
            all but exactly by every block of columns in it.
        damp: relative to the mean diagonal of H; raised where H is singular.
        block_size: columns for which a mask is chosen at once, and whose effect on the columns
            after them is applied at once.
        grid: what kept weights are rounded to; None to leave them floating.
        group_size: columns that share a grid, or -1; a multiple of m for an n:m pattern.
        where: names the layer in errors.

    Source: Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot", 2023.
    """
    n, k = weight.shape
    step = max((part.amount.of for part in parts if isinstance(part.amount, NofM)), default=1)
    size = group_length(group_size, k)
    unit = size if grid is not None and size < k else step
    # Whole groups of m in a block, for the mask of one must not be chosen before it is up to date.
    blocks = aligned_blocks(k, unit, max(step, block_size // step * step))
    ends = dict(blocks)

    columns = weight.T.clone(memory_format=torch.contiguous_format)
    masks = _Masks(columns, inverse_factor(hessian, damp, where), hessian.diagonal() == 0, parts)
    groups = -(-k // size)
    q = torch.empty_like(columns, dtype=torch.uint8) if grid is not None else None
    scale, zero = columns.new_empty(groups, n), columns.new_empty(groups, n)

    def replace(j: int) -> Tensor:
        if j in ends:
            masks.choose_shares(j, ends[j])
        if j % step == 0:
            masks.choose_patterns(j)
        if grid is None or q is None:
            return columns[j].masked_fill(~masks.kept[j], 0.0)
        g = j // size
        if j % size == 0:
            stays = columns[j : j + size] * masks.expected(j, min(j + size, k))
            scale[g], zero[g] = grid.fit(stays.T.contiguous())
        values = grid.quantize(columns[j], scale[g], zero[g])
        values = torch.where(masks.kept[j], values, zero[g])
        q[j] = values
        return (values - zero[g]).mul_(scale[g])

    sweep(columns, masks.factor, blocks, replace)
    integers = None
    if q is not None:
        integers = Integers(q.T.contiguous(), scale.T.contiguous(), zero.T.contiguous())
    return Solution(columns.T.contiguous(), masks.kept.T.contiguous(), integers)


class _Masks:
    """What is kept, column by column as the sweep gets there: ``kept`` bool [K, N]."""

    def __init__(
        self, columns: Tensor, factor: Tensor, dead: Tensor, parts: Sequence[Part]
    ) -> None:
        self.kept = torch.ones_like(columns, dtype=torch.bool)
        self.factor = factor
        self._columns = columns
        self._parts: list[tuple[slice, Amount]] = []
        self._chosen = 0  # columns whose mask stands
        start = 0
        for part in parts:
            self._parts.append((slice(start, start + part.rows), part.amount))
            start += part.rows
        # A zero costs nothing where the input was never active.
        self._weighing = factor.diagonal().reciprocal().masked_fill(dead, 0.0)

    def choose_shares(self, start: int, stop: int) -> None:
        """The masks of a block of columns, where a share of them goes."""
        for rows, amount in self._parts:
            if not isinstance(amount, NofM):
                # Counted from the first column, so that roundings do not add up.
                many = rows.stop - rows.start
                count = zeros_of(amount, many * stop) - zeros_of(amount, many * start)
                self.kept[start:stop, rows] = self._largest(start, stop, rows, count)
                self._chosen = stop

    def choose_patterns(self, start: int) -> None:
        """The masks of the m columns from here on, where n of m stay."""
        for rows, amount in self._parts:
            if isinstance(amount, NofM) and start % amount.of == 0:
                stop = start + amount.of
                self.kept[start:stop, rows] = self._patterned(start, stop, rows, amount)
                self._chosen = stop

    def expected(self, start: int, stop: int) -> Tensor:
        """The masks of columns, those not chosen yet as they would be now: bool."""
        if stop <= self._chosen:
            return self.kept[start:stop]
        result = self.kept[start:stop].clone()
        for rows, amount in self._parts:
            if isinstance(amount, NofM):
                result[:, rows] = self._patterned(start, stop, rows, amount)
            else:
                count = zeros_of(amount, (rows.stop - rows.start) * (stop - start))
                result[:, rows] = self._largest(start, stop, rows, count)
        return result

    def _cost(self, start: int, stop: int, rows: slice) -> Tensor:
        return (self._columns[start:stop, rows] * self._weighing[start:stop, None]).square_()

    def _largest(self, start: int, stop: int, rows: slice, count: int) -> Tensor:
        cost = self._cost(start, stop, rows)
        return ~smallest(cost.reshape(1, -1), count).view_as(cost)

    def _patterned(self, start: int, stop: int, rows: slice, pattern: NofM) -> Tensor:
        return keep_n_of_m(self._cost(start, stop, rows).T.contiguous(), pattern).T
