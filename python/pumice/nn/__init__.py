"""Layers with compressed weights: drop-in replacements for ``nn.Linear``."""

from pumice.nn._linear import CompressedLinear, layer_from_config
from pumice.nn.int4_linear import Int4Linear
from pumice.nn.int8_linear import Int8Linear
from pumice.nn.int8_mixed_linear import Int8MixedLinear
from pumice.nn.sparse24_linear import Sparse24Linear

__all__ = [
    "CompressedLinear",
    "Int4Linear",
    "Int8Linear",
    "Int8MixedLinear",
    "Sparse24Linear",
    "layer_from_config",
]
