"""Round to nearest: each group of weights on a grid of its own, no data needed.

The baseline of every group-wise method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pumice.calibration import Block, Stage
from pumice.nn import Int4Linear
from pumice.nn._linear import finite_weight
from pumice.quantize.grid import Grid, check_grid, expand, scale_dtype_for
from pumice.quantize.recipe import LinearRecipe


@dataclass(frozen=True)
class RTN(LinearRecipe):
    """Round every weight to the nearest value of its group's grid.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale: a multiple of 16, or -1 for the whole row.
        symmetric: no zero points. Otherwise the grid spans the group's range, with an integer zero
            point stored for it.
        mse: search the range with the smallest error, as GPTQ's reference code does, instead of
            taking the full one.
    """

    name = "rtn"

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    mse: bool = False

    def validate(self) -> None:
        check_grid("RTN", self.bits, self.group_size)

    def compress_linear(self, linear: nn.Linear) -> Int4Linear:
        return round_linear(linear, self.bits, self.group_size, self.symmetric, mse=self.mse)

    def stages(self) -> list[Stage]:
        return [RoundStage(self)]


class RoundStage(Stage):
    """Round a block's layers to nearest: the last stage after one that only prepares."""

    def __init__(self, recipe: RTN) -> None:
        self._recipe = recipe

    def process(self, block: Block) -> None:
        for name, linear in block.layers.items():
            with block.naming(name):
                layer = self._recipe.compress_linear(linear)
            block.replace(name, layer)


def round_linear(
    linear: nn.Linear,
    bits: int,
    group_size: int,
    symmetric: bool,
    *,
    mse: bool = False,
    weight: Tensor | None = None,
) -> Int4Linear:
    """A linear layer with its weight (or the one given instead) rounded to nearest."""
    weight = check_finite(linear) if weight is None else weight
    grid = Grid(bits, symmetric, mse, scale_dtype_for(weight, bits))
    scale, zero = grid.fit_groups(weight, group_size)
    k = weight.shape[1]
    q = grid.quantize(weight, expand(scale, group_size, k), expand(zero, group_size, k))
    return Int4Linear.from_quantized(
        linear,
        q.to(torch.uint8),
        scale.to(grid.scale_dtype),
        None if symmetric else zero.to(torch.uint8),
        bits=bits,
        group_size=group_size,
    )


def check_finite(linear: nn.Linear) -> Tensor:
    """The weight in fp32; ValueError, naming rows, if it holds NaN or infinities."""
    return finite_weight(linear, "Int4Linear")
