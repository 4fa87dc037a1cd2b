"""LLM.int8(): mixed-precision int8 decomposition.

Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at
Scale", 2022. Weights become int8 row by row by their absolute maximum; no calibration is needed,
because outlier columns of the activations are found while the model runs and kept in 16 bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pumice.nn import Int8MixedLinear
from pumice.ops._checks import check_threshold
from pumice.quantize.recipe import LinearRecipe


@dataclass(frozen=True)
class LLMInt8(LinearRecipe):
    """LLM.int8() on every chosen linear layer.

    Args:
        threshold: |x| from which an activation makes its column an outlier, in the units of the
            activations; the paper's 6.0.
        per_element: keep outlying elements alone in 16 bit, so that no token depends on its
            neighbours (see :func:`pumice.ops.int8_mixed_linear`).
    """

    name = "llm_int8"

    threshold: float = 6.0
    per_element: bool = False

    def validate(self) -> None:
        check_threshold("LLMInt8", self.threshold)
        if not isinstance(self.per_element, bool):
            raise TypeError(f"LLMInt8: per_element must be a bool, not {self.per_element!r}")

    @property
    def outlier_threshold(self) -> float:
        return self.threshold

    def compress_linear(self, linear: nn.Linear) -> Int8MixedLinear:
        return Int8MixedLinear.from_linear(
            linear, threshold=self.threshold, per_element=self.per_element
        )
