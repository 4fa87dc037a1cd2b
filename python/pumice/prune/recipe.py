"""What pruning methods have in common: how much of which layer goes, and how the rest is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from pumice.nn import Sparse24Linear
from pumice.nn._linear import finite_weight
from pumice.prune._layers import dense_layer
from pumice.prune.pattern import Amount, NofM, Ratio, check_columns, check_ratio, ratio_of
from pumice.quantize.recipe import Recipe

Store = Literal["sparse", "dense"]
Compare = Literal["row", "layer"]

_HALF = 0.5


@dataclass(frozen=True)
class PruningRecipe(Recipe):
    """Settings of every pruning method.

    Args:
        ratio: the share of each layer's weights that become zero, in [0, 1); 0.5 if neither it nor
            a pattern is given. Or a mapping from name patterns (:mod:`fnmatch`, on the qualified
            name and its last part; the first that fits counts) to ratios: ``{"*.down_proj": 0.4,
            "*": 0.5}``.
        pattern: "n:m" instead: of every m neighbouring inputs n are *kept*. The inputs of each
            layer must be a multiple of m.
        store: how a weight that is 2:4 (or 1:4) is kept: "sparse" as a
            :class:`pumice.nn.Sparse24Linear`, "dense" as a linear layer with zeros in it, as every
            other pattern is.
    """

    prunes: ClassVar[bool] = True

    ratio: Ratio | None = None
    pattern: str | None = None
    store: Store = "sparse"

    def validate(self) -> None:
        who = type(self).__name__
        if self.pattern is not None:
            NofM.parse(self.pattern, who)
            if self.ratio is not None:
                raise ValueError(
                    f"{who}: pass ratio or pattern, not both; {self.pattern} says how many are zero"
                )
        if isinstance(self.ratio, Mapping):
            if not self.ratio:
                raise ValueError(f"{who}: ratio is an empty mapping")
            for name, ratio in self.ratio.items():
                if not isinstance(name, str):
                    raise TypeError(f"{who}: ratio must map name patterns, not {name!r}")
                check_ratio(ratio, f"{who}: {name!r}")
        elif self.ratio is not None:
            check_ratio(self.ratio, who)
        if self.store not in get_args(Store):
            raise ValueError(f"{who}: store must be one of {get_args(Store)}, not {self.store!r}")

    @property
    def structure(self) -> NofM | None:
        """The n:m pattern, if there is one."""
        return None if self.pattern is None else NofM.parse(self.pattern, type(self).__name__)

    def amount(self, layer: str, linear: nn.Linear) -> Amount:
        """How much of a layer becomes zero; ValueError if it cannot be divided so."""
        who = type(self).__name__
        if self.structure is None:
            return ratio_of(_HALF if self.ratio is None else self.ratio, layer, who)
        check_columns(self.structure, linear.in_features, who)
        return self.structure

    def weight(self, linear: nn.Linear) -> Tensor:
        """The weight to be pruned, fp32; ValueError if it is not finite."""
        return finite_weight(linear, type(self).__name__)

    @property
    def stores_2_of_4(self) -> bool:
        """Whether layers store two of every four weights: those of 2:4 and 1:4 do."""
        fits = self.structure is not None and self.structure.of == 4 and self.structure.kept <= 2
        return fits and self.store == "sparse"

    def layer(self, linear: nn.Linear, weight: Tensor) -> nn.Module:
        """What stands for ``linear`` with its pruned weight [N, K]."""
        dense = dense_layer(linear, weight)
        return Sparse24Linear.from_linear(dense) if self.stores_2_of_4 else dense


def check_compare(compare: object, who: str) -> None:
    if compare not in get_args(Compare):
        raise ValueError(f"{who}: compare must be one of {get_args(Compare)}, not {compare!r}")
