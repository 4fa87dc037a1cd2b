"""SparseGPT: pruning that makes up for itself, alone or in one sweep with quantization.

Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023.
The solver is in :mod:`pumice.prune.sparsegpt_solver`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pumice.calibration import Block, Hessian, SharedInput, Stage
from pumice.nn import Int4Linear, Sparse24Linear
from pumice.prune.pattern import Amount
from pumice.prune.recipe import PruningRecipe
from pumice.prune.sparsegpt_solver import Part, Solution, solve
from pumice.quantize.calibrated import CalibratedRecipe
from pumice.quantize.grid import Grid, check_grid, scale_dtype_for
from pumice.quantize.hessian_stage import HessianStage


@dataclass(frozen=True)
class SparseGPT(PruningRecipe, CalibratedRecipe):
    """Set weights to zero where that costs least, and let the others make up for it.

    ::

        pumice.SparseGPT(0.5)                                # half of the weights, anywhere
        pumice.SparseGPT(pattern="2:4")                      # for sparse tensor cores
        pumice.SparseGPT(pattern="2:4", bits=4)              # and 4-bit integers, in one sweep

    The cost of a zero and the change of the others follow from the Hessian of the layer's inputs,
    as in :class:`pumice.GPTQ`, whose machinery this is. Of a ratio the weights of a block of
    columns compete, over all rows of the layer. With ``bits`` the weights that stay are rounded in
    the same sweep, so that each makes up for the zeros and the rounding before it: 2:4 becomes a
    :class:`pumice.nn.Sparse24Linear` of integers, any other pattern a :class:`pumice.nn.Int4Linear`
    that holds its zero points where weights are gone.

    Calibrate on text of many kinds: of a single article it learns what is peculiar to it, and stays
    behind :class:`pumice.Wanda`. It warns of fewer than four tokens for an input.

    Layers outside of the model's repeated blocks, if chosen, are pruned (and rounded) as if their
    inputs were independent and alike, H = 1, which is by magnitude.

    Args:
        ratio, pattern, store: see :class:`pumice.prune.PruningRecipe`.
        damp: added to the diagonal of the Hessian, relative to its mean; raised tenfold as long as
            the Hessian is singular.
        block_size: columns whose mask is chosen at once.
        bits: 2, 3, 4 or 8, or None to leave the weights floating.
        group_size: with ``bits``, columns that share a scale: a multiple of 16 and of the pattern's
            m (stored as 2:4: of 32), or -1 for the whole row.
        symmetric: with ``bits``, no zero points.
        mse: with ``bits``, search each grid's range instead of taking the full one.
    """

    name = "sparsegpt"

    damp: float = 0.01
    block_size: int = 128
    bits: int | None = None
    group_size: int = 128
    symmetric: bool = True
    mse: bool = False

    def validate(self) -> None:
        super().validate()
        who = type(self).__name__
        if isinstance(self.damp, bool) or not isinstance(self.damp, (int, float)):
            raise TypeError(f"{who}: damp must be a number, not {self.damp!r}")
        if not 0 <= self.damp <= 1:
            raise ValueError(f"{who}: damp must be in 0 … 1, not {self.damp}")
        if (
            isinstance(self.block_size, bool)
            or not isinstance(self.block_size, int)
            or self.block_size < 1
        ):
            raise ValueError(f"{who}: block_size must be a positive integer, not {self.block_size}")
        if self.bits is None:
            return
        check_grid(who, self.bits, self.group_size)
        if self.stores_2_of_4 and self.group_size != -1 and self.group_size % 32:
            raise ValueError(
                f"{who}: group_size must be a multiple of 32 where two of every four weights are "
                f"stored, not {self.group_size}; or pass store='dense'"
            )
        structure = self.structure
        if structure is not None and self.group_size != -1 and self.group_size % structure.of:
            raise ValueError(
                f"{who}: group_size must be a multiple of {structure.of}, for the pattern "
                f"{structure}, not {self.group_size}"
            )

    def stages(self) -> list[Stage]:
        return [SparseGPTStage(self)]

    def solve(
        self, weight: Tensor, hessian: Tensor, parts: list[Part], where: str
    ) -> tuple[Solution, Grid | None]:
        """The pruned matrix, and how its grids were chosen."""
        grid = None
        if self.bits is not None:
            scale_dtype = scale_dtype_for(weight, self.bits)
            grid = Grid(self.bits, self.symmetric, self.mse, scale_dtype)
        solution = solve(
            weight,
            hessian,
            parts,
            damp=self.damp,
            block_size=self.block_size,
            grid=grid,
            group_size=self.group_size,
            where=where,
        )
        return solution, grid

    def compress_outside(self, name: str, linear: nn.Linear) -> nn.Module:
        weight = self.weight(linear)
        amount = self.amount(name, linear)
        alike = torch.eye(linear.in_features, device=weight.device)
        where = f"layer {name!r}"
        solution, grid = self.solve(weight, alike, [Part(len(weight), amount)], where)
        return self.solved_layer(linear, solution, grid)

    def solved_layer(self, linear: nn.Linear, solution: Solution, grid: Grid | None) -> nn.Module:
        """What stands for ``linear`` with its part of a solution."""
        found = solution.integers
        if grid is None or found is None:
            return self.layer(linear, solution.weight)
        scales = found.scale.to(grid.scale_dtype)
        zeros = None if self.symmetric else found.zero.to(torch.uint8)
        size = self.group_size
        if self.stores_2_of_4:
            return Sparse24Linear.from_quantized(
                linear, found.q, scales, zeros, solution.kept, bits=grid.bits, group_size=size
            )
        return Int4Linear.from_quantized(
            linear, found.q, scales, zeros, bits=grid.bits, group_size=size
        )


class SparseGPTStage(HessianStage):
    """Prune a block's layers, those of one input together."""

    def __init__(self, recipe: SparseGPT) -> None:
        super().__init__(type(recipe).__name__)
        self._recipe = recipe

    def compress(self, block: Block, group: SharedInput[Hessian]) -> None:
        recipe = self._recipe
        linears = [block.layers[name] for name in group.names]
        weights: list[Tensor] = []
        amounts: list[Amount] = []
        for name, linear in zip(group.names, linears, strict=True):
            with block.naming(name):
                weights.append(recipe.weight(linear))
                amounts.append(recipe.amount(block.full_name(name), linear))
        parts = [Part(len(w), amount) for w, amount in zip(weights, amounts, strict=True)]
        solution, grid = recipe.solve(
            torch.cat(weights),
            group.statistic.value,
            parts,
            f"layer {block.full_name(group.names[0])!r}",
        )
        start = 0
        for name, linear, part in zip(group.names, linears, parts, strict=True):
            own = solution.rows(start, start + part.rows)
            start += part.rows
            with block.naming(name):
                layer = recipe.solved_layer(linear, own, grid)
            block.replace(name, layer)
