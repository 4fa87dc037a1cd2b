"""Quantization methods, one file each, named after the method."""

from pumice.quantize.awq import AWQ, AWQScaling
from pumice.quantize.gptq import GPTQ
from pumice.quantize.int8 import Int8
from pumice.quantize.llm_int8 import LLMInt8
from pumice.quantize.recipe import Recipe, make_recipe, recipe_from_dict, recipe_names
from pumice.quantize.rtn import RTN

__all__ = [
    "AWQ",
    "GPTQ",
    "RTN",
    "AWQScaling",
    "Int8",
    "LLMInt8",
    "Recipe",
    "make_recipe",
    "recipe_from_dict",
    "recipe_names",
]
