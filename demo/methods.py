"""The rows of the demo's table."""

from __future__ import annotations

from dataclasses import dataclass

import pumice
from pumice.quantize import Recipe


@dataclass(frozen=True)
class Method:
    """One way to hold the same model; no recipe for the model as it is."""

    name: str
    label: str
    recipe: Recipe | None


UNCOMPRESSED = Method("uncompressed", "uncompressed", None)
# One scale for all activations of a layer and one for its weight: a single large activation
# stretches the grid for every token.
NAIVE = Method(
    "naive", "naive int8 (per tensor)", pumice.Int8(activations="per_tensor", weights="per_tensor")
)
VECTOR_WISE = Method("vector_wise", "int8 (token + channel)", pumice.Int8())
# 6.0 was found on models of billions of parameters. This one's outliers are smaller, and are caught
# by a lower threshold: transformers' documentation advises the same for small models.
PAPER = Method("llm_int8_6", "LLM.int8(), threshold 6", pumice.LLMInt8(threshold=6.0))
LLM_INT8 = Method("llm_int8", "LLM.int8(), threshold 4", pumice.LLMInt8(threshold=4.0))

METHODS = (UNCOMPRESSED, NAIVE, VECTOR_WISE, PAPER, LLM_INT8)
