"""GPTQ: rounding that makes up for itself.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", 2022. The solver is in :mod:`pumice.quantize.gptq_solver`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pumice.calibration import Block, Hessian, SharedInput, Stage
from pumice.nn import Int4Linear
from pumice.quantize.calibrated import CalibratedRecipe
from pumice.quantize.gptq_solver import solve
from pumice.quantize.grid import Grid, check_grid, scale_dtype_for
from pumice.quantize.hessian_stage import HessianStage
from pumice.quantize.rtn import check_finite, round_linear


@dataclass(frozen=True)
class GPTQ(CalibratedRecipe):
    """GPTQ on every chosen linear layer.

    Weights are rounded column by column, and the columns not yet rounded are changed so as to make
    up for it, in the metric of the inputs that calibration shows. Layers outside of the model's
    repeated blocks, if chosen, are rounded to nearest.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale: a multiple of 16, or -1 for the whole row.
        damp: added to the diagonal of the Hessian, relative to its mean. The paper's 0.01 is for
            much calibration data (128 × 2048 tokens); with a few thousand tokens the Hessian's
            small eigenvalues are noise, and 0.1 to 1 serves better.
        act_order: begin with the inputs of most energy. Without it GPTQ can lose to rounding, with
            much data, too: the average token errs less, but the one that all others attend to may
            err more (README).
        static_groups: with ``act_order``, groups of neighbouring columns, on grids fitted
            beforehand; otherwise columns are grouped in the order they are visited, and stored
            with a permutation.
        block_size: columns of a lazy batch; for speed alone.
        symmetric: no zero points.
        mse: search each grid's range instead of taking the full one.
    """

    name = "gptq"

    bits: int = 4
    group_size: int = 128
    damp: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    block_size: int = 128
    symmetric: bool = True
    mse: bool = False

    def validate(self) -> None:
        check_grid("GPTQ", self.bits, self.group_size)
        if isinstance(self.damp, bool) or not isinstance(self.damp, (int, float)):
            raise TypeError(f"GPTQ: damp must be a number, not {self.damp!r}")
        if not 0 <= self.damp <= 1:
            raise ValueError(f"GPTQ: damp must be in 0 … 1, not {self.damp}")
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"GPTQ: block_size must be a positive integer, not {self.block_size}")

    def stages(self) -> list[Stage]:
        return [GPTQStage(self)]

    def compress_outside(self, name: str, linear: nn.Linear) -> nn.Module:
        return round_linear(linear, self.bits, self.group_size, self.symmetric, mse=self.mse)


class GPTQStage(HessianStage):
    """Quantize a block's layers, those of one input together."""

    def __init__(self, recipe: GPTQ) -> None:
        super().__init__(type(recipe).__name__)
        self._recipe = recipe

    def compress(self, block: Block, group: SharedInput[Hessian]) -> None:
        recipe, names = self._recipe, group.names
        linears = [block.layers[name] for name in names]
        weights = []
        for name, linear in zip(names, linears, strict=True):
            with block.naming(name):
                weights.append(check_finite(linear))
        weight = torch.cat(weights)
        grid = Grid(recipe.bits, recipe.symmetric, recipe.mse, scale_dtype_for(weight, recipe.bits))
        solution = solve(
            weight,
            group.statistic.value,
            grid,
            recipe.group_size,
            damp=recipe.damp,
            act_order=recipe.act_order,
            static_groups=recipe.static_groups,
            block_size=recipe.block_size,
            where=f"layer {block.full_name(names[0])!r}",
        )
        rows = [linear.out_features for linear in linears]
        for name, linear, q, scale, zero in zip(
            names,
            linears,
            solution.q.split(rows),
            solution.scale.split(rows),
            solution.zero.split(rows),
            strict=True,
        ):
            layer = Int4Linear.from_quantized(
                linear,
                q,
                scale.to(grid.scale_dtype),
                None if recipe.symmetric else zero.to(torch.uint8),
                bits=recipe.bits,
                group_size=recipe.group_size,
                perm=solution.perm,
            )
            block.replace(name, layer)
