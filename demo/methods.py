"""The rows of the demo's table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

import pumice
from pumice.quantize import Recipe


@dataclass(frozen=True)
class Method:
    """One way to hold the same model; no recipe for the model as it is."""

    name: str
    label: str
    recipe: Recipe | None
    calibration: int = 0  # windows that the method looks at
    observed: int = 0  # windows that only the report of the method looks at

    def digest(self, calibration: Sequence[Tensor]) -> str:
        """Of what the compressed weights depend on, beside the model."""
        settings = self.recipe.to_dict() if self.recipe else None
        tokens = [window.tolist() for window in calibration]
        text = json.dumps([pumice.__version__, settings, tokens], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


UNCOMPRESSED = Method("uncompressed", "uncompressed", None)
# One scale for all activations of a layer and one for its weight: a single large activation
# stretches the grid for every token.
NAIVE = Method(
    "naive", "naive int8 (per tensor)", pumice.Int8(activations="per_tensor", weights="per_tensor")
)
VECTOR_WISE = Method("vector_wise", "int8 (token + channel)", pumice.Int8())
# The paper's threshold is 6. On this small model it misses the bound that the demo judges by
# (+2.3 % on these 20 windows, +2.0 % ± 0.2 over 40), so the row that is judged has a lower one,
# which keeps more columns in 16 bit. It was chosen by looking at this same text, and then held on
# articles of the calibration split (12 windows: 6 gives +1.9 % ± 0.4, 4 gives +1.1 % ± 0.3).
PAPER = Method("llm_int8_6", "LLM.int8(), threshold 6", pumice.LLMInt8(threshold=6.0))
LLM_INT8 = Method("llm_int8", "LLM.int8(), threshold 4", pumice.LLMInt8(threshold=4.0), observed=2)

# Four bits, one scale and zero point for 64 weights. Eight windows are little for GPTQ (it warns):
# the demo shows the way, bench/quality.py measures.
RTN4 = Method("rtn4", "int4 round to nearest", pumice.RTN(4, 64, symmetric=False))
GPTQ4 = Method("gptq4", "int4 GPTQ", pumice.GPTQ(4, 64, symmetric=False), calibration=8)
AWQ4 = Method("awq4", "int4 AWQ", pumice.AWQ(4, 64, search_tokens=512), calibration=8)

METHODS = (UNCOMPRESSED, NAIVE, VECTOR_WISE, PAPER, LLM_INT8, RTN4, GPTQ4, AWQ4)
