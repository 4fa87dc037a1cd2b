"""Magnitude pruning: the smallest weights go. No data needed; the baseline of every method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pumice.calibration import Block, Stage
from pumice.prune.pattern import keep
from pumice.prune.recipe import Compare, PruningRecipe, check_compare
from pumice.quantize.recipe import LinearRecipe


@dataclass(frozen=True)
class Magnitude(PruningRecipe, LinearRecipe):
    """Set the smallest weights of every chosen layer to zero.

    On a language model it collapses at ratios that :class:`pumice.Wanda` and
    :class:`pumice.SparseGPT` survive: a small weight may meet a large input.

    Args:
        ratio, pattern, store: see :class:`pumice.prune.PruningRecipe`.
        compare: the weights that compete: all of a "layer", or those of each "row" (output).

    Source: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural
    Networks", 2015.
    """

    name = "magnitude"

    compare: Compare = "layer"

    def validate(self) -> None:
        super().validate()
        check_compare(self.compare, type(self).__name__)

    def compress_linear(self, linear: nn.Linear) -> nn.Module:
        return self.compress_named("", linear)

    def compress_named(self, name: str, linear: nn.Linear) -> nn.Module:
        weight = self.weight(linear)
        kept = keep(weight.abs(), self.amount(name, linear), by_row=self.compare == "row")
        return self.layer(linear, weight.masked_fill(~kept, 0.0))

    def stages(self) -> list[Stage]:
        return [MagnitudeStage(self)]


class MagnitudeStage(Stage):
    """Prune a block's layers by magnitude: the last stage after one that only prepares."""

    def __init__(self, recipe: Magnitude) -> None:
        self._recipe = recipe

    def process(self, block: Block) -> None:
        for name, linear in block.layers.items():
            with block.naming(name):
                layer = self._recipe.compress_named(block.full_name(name), linear)
            block.replace(name, layer)
