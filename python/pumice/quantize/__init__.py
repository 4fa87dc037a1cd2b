"""Quantization methods, one file each, named after the method."""

from pumice.quantize.int8 import Int8
from pumice.quantize.llm_int8 import LLMInt8
from pumice.quantize.recipe import Recipe, make_recipe, recipe_from_dict, recipe_names

__all__ = ["Int8", "LLMInt8", "Recipe", "make_recipe", "recipe_from_dict", "recipe_names"]
