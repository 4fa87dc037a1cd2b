"""SparseGPT derived anew, slowly, in float64: an explicit inverse for every column.

Setting weight j of a row to v, with the columns before it settled, costs (w_j - v)² / [H_R⁻¹]_jj,
where R are the columns from j on; the others of R move by -(w_j - v) / [H_R⁻¹]_jj · [H_R⁻¹]_j.
"""

import torch
from torch import Tensor


def damped(hessian: Tensor, damp: float) -> Tensor:
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    h += damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    h[dead, dead] = 1.0
    return h


def smallest(costs: list[tuple[float, int, int]], count: int) -> set[tuple[int, int]]:
    """(column, row) of the count cheapest, of equal ones the first."""
    return {(column, row) for _, column, row in sorted(costs)[:count]}


def grid_of(w: Tensor, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale (rounded to fp16, as it is stored) and zero point of one group of one row."""
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    if symmetric:
        high = float(w.abs().max())
        low = -high
    if high == low:
        return 1.0, 2 ** (bits - 1) if symmetric else 0
    scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
    return scale, 2 ** (bits - 1) if symmetric else round(-low / scale)


class Sweep:
    """One matrix on its way through the columns."""

    def __init__(self, weight, hessian, amounts, damp, block_size):
        self.w = weight.double().clone()
        n, self.k = self.w.shape
        self.kept = torch.ones(n, self.k, dtype=torch.bool)
        self.block_size = block_size
        h = damped(hessian, damp)
        self.inverse = [torch.linalg.inv(h[j:, j:]) for j in range(self.k)]
        self.dead = hessian.diagonal() == 0
        self.parts, start = [], 0
        for rows, amount in amounts:
            self.parts.append((range(start, start + rows), amount))
            start += rows

    def costs(self, rows, columns):
        """What each zero costs when the sweep comes to it, with the weights as they are now."""
        return [
            (0.0 if self.dead[c] else float(self.w[r, c] ** 2 / self.inverse[c][0, 0]), c, r)
            for c in columns
            for r in rows
        ]

    def choose(self, j):
        """The masks that are chosen when the sweep comes to column j."""
        for rows, amount in self.parts:
            if isinstance(amount, tuple):
                if j % amount[1] == 0:
                    self._drop(self.dropped_of_pattern(rows, range(j, j + amount[1]), amount))
            elif j % self.block_size == 0:
                stop = min(j + self.block_size, self.k)
                count = int(amount * len(rows) * stop + 0.5) - int(amount * len(rows) * j + 0.5)
                self._drop(smallest(self.costs(rows, range(j, stop)), count))

    def dropped_of_pattern(self, rows, columns, amount):
        dropped = set()
        for start in columns[:: amount[1]]:
            group = range(start, start + amount[1])
            for row in rows:
                dropped |= smallest(self.costs([row], group), amount[1] - amount[0])
        return dropped

    def expected(self, j, stop):
        """The masks of columns j … stop - 1, those not chosen yet as they would be now."""
        kept = self.kept.clone()
        block_end = j // self.block_size * self.block_size + self.block_size
        for rows, amount in self.parts:
            columns = range(j, stop)
            if isinstance(amount, tuple):
                kept[rows.start : rows.stop, j:stop] = True
                dropped = self.dropped_of_pattern(rows, columns, amount)
            elif stop <= block_end:
                continue
            else:
                kept[rows.start : rows.stop, j:stop] = True
                count = int(amount * len(rows) * len(columns) + 0.5)
                dropped = smallest(self.costs(rows, columns), count)
            for column, row in dropped:
                kept[row, column] = False
        return kept[:, j:stop]

    def settle(self, j, values):
        for row, value in enumerate(values):
            inverse = self.inverse[j]
            error = (self.w[row, j] - value) / inverse[0, 0]
            self.w[row, j:] -= error * inverse[0]
            self.w[row, j] = value

    def _drop(self, dropped):
        for column, row in dropped:
            self.kept[row, column] = False


def solve(
    weight: Tensor,
    hessian: Tensor,
    amounts: list[tuple[int, object]],
    block_size: int,
    damp: float = 0.01,
    bits: int | None = None,
    group_size: int = 0,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor]:
    """The pruned matrix, float64, and what was kept.

    Args:
        amounts: (rows, ratio or (n, m)) of consecutive rows.
        bits: to round what is kept, on grids of ``group_size`` columns.
    """
    sweep = Sweep(weight, hessian, amounts, damp, block_size)
    n, k = weight.shape
    grids = [(0.0, 0)] * n
    for j in range(k):
        sweep.choose(j)
        if bits is not None and j % group_size == 0:
            stop = min(j + group_size, k)
            stays = sweep.w[:, j:stop] * sweep.expected(j, stop)
            grids = [grid_of(row, bits, symmetric) for row in stays]
        values = []
        for row in range(n):
            value = float(sweep.w[row, j]) if sweep.kept[row, j] else 0.0
            if bits is not None and sweep.kept[row, j]:
                scale, zero = grids[row]
                q = min(max(round(value / scale) + zero, 0), 2**bits - 1)
                value = (q - zero) * scale
            values.append(value)
        sweep.settle(j, values)
    return sweep.w, sweep.kept
