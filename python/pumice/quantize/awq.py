"""AWQ: protect the weights that large activations meet, by scaling them before rounding.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han, "AWQ: Activation-aware Weight Quantization
for LLM Compression and Acceleration", 2023. Input channels with large activations get larger
weights, hence a smaller relative rounding error; the module before divides by the same scale (see
:mod:`pumice.quantize.fold`). Then the range of each group is clipped to what rounds best.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pumice.calibration import Stage
from pumice.quantize.awq_stages import ClipStage, ScaleStage
from pumice.quantize.calibrated import CalibratedRecipe
from pumice.quantize.grid import Grid, check_grid
from pumice.quantize.rtn import RTN, RoundStage, round_linear


@dataclass(frozen=True)
class AWQScaling(CalibratedRecipe):
    """The scaling of AWQ alone: weights stay floating, another recipe compresses them.

    ::

        pumice.compress(model, [pumice.AWQScaling(bits=4), pumice.GPTQ(bits=4)], calibration)

    For layers that share an input x, s = (mean |x|)^α, normalized by √(max s · min s), for the α of
    0, 1/grid, 2/grid, … for which the module that holds them (the attention or the MLP; a layer
    alone: itself) changes its output least in the mean square, when W · diag(s) is rounded to
    nearest and the input divided by s. Where no module before can take the division, as before a
    layer that follows a GELU, there is no scale.

    Args:
        bits, group_size, symmetric: of the rounding that is to follow.
        grid: number of α tried.
        search_tokens: calibration tokens (of each process) that the search runs on; whole samples
            are taken until there are as many.
    """

    name = "awq_scaling"
    compresses = False

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    grid: int = 20
    search_tokens: int = 4096

    def validate(self) -> None:
        name = type(self).__name__
        check_grid(name, self.bits, self.group_size)
        for setting, value in (("grid", self.grid), ("search_tokens", self.search_tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {setting} must be a positive integer, not {value!r}")

    def stages(self) -> list[Stage]:
        rounding = Grid(self.bits, self.symmetric)
        return [ScaleStage(rounding, self.group_size, self.grid, self.search_tokens)]

    def compress_outside(self, name: str, linear: nn.Linear) -> nn.Module:
        return round_linear(linear, self.bits, self.group_size, self.symmetric)


@dataclass(frozen=True)
class AWQ(AWQScaling):
    """AWQ on every chosen linear layer: scaling, clipping, rounding to nearest.

    Layers outside of the model's repeated blocks, if chosen, are rounded to nearest as they are.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale: a multiple of 16, or -1 for the whole row.
        symmetric: no zero points. The paper's method has them.
        grid: number of scales tried, see :class:`AWQScaling`.
        search_tokens: what the search of scales runs on, see :class:`AWQScaling`.
        clip: search the largest weight of each group, down to half, for which the layer's output
            changes least; not for queries and keys, whose products clipping would distort.
    """

    name = "awq"
    compresses = True

    clip: bool = True

    def stages(self) -> list[Stage]:
        rounding = Grid(self.bits, self.symmetric)
        clipping: list[Stage] = [ClipStage(rounding, self.group_size)] if self.clip else []
        nearest = RTN(self.bits, self.group_size, self.symmetric)
        return [*super().stages(), *clipping, RoundStage(nearest)]
