"""Plain W8A8: weights and activations rounded to int8, nothing else.

The baseline that LLM.int8() is judged against. With one scale for a whole tensor, a few outlying
activations stretch the grid until all others round to a handful of values; a scale for each token
and each output channel suffers less.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pumice.nn.int8_linear import Activations, Int8Linear, Weights, check_granularity
from pumice.quantize.recipe import LinearRecipe


@dataclass(frozen=True)
class Int8(LinearRecipe):
    """Round-to-nearest W8A8 on every chosen linear layer.

    Args:
        activations: "per_token" or "per_tensor": what one scale of the activations covers.
        weights: "per_channel" or "per_tensor": what one scale of the weight covers.
    """

    name = "int8"

    activations: Activations = "per_token"
    weights: Weights = "per_channel"

    def validate(self) -> None:
        check_granularity("Int8", self.activations, self.weights)

    def compress_linear(self, linear: nn.Linear) -> Int8Linear:
        return Int8Linear.from_linear(linear, activations=self.activations, weights=self.weights)
