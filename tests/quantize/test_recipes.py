"""Recipes: settings, names, storage."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import pumice
from pumice.nn import Int8Linear, Int8MixedLinear
from pumice.quantize import make_recipe, recipe_from_dict, recipe_names


@pytest.mark.parametrize(
    "recipe",
    [
        pumice.LLMInt8(),
        pumice.LLMInt8(threshold=4.5, per_element=True),
        pumice.LLMInt8(threshold=float("inf")),
        pumice.Int8(),
        pumice.Int8(activations="per_tensor", weights="per_tensor"),
        pumice.RTN(3, 64, symmetric=False, mse=True),
        pumice.GPTQ(2, -1, damp=0.1, act_order=False, static_groups=False, block_size=64),
        pumice.AWQScaling(grid=5, search_tokens=100),
        pumice.AWQ(3, 32, symmetric=True, clip=False),
    ],
)
def test_storage_round_trip(recipe):
    stored = json.loads(json.dumps(recipe.to_dict()))
    assert recipe_from_dict(stored) == recipe


def test_every_recipe_has_a_name():
    assert {"int8", "llm_int8"} <= set(recipe_names())
    assert make_recipe("llm_int8", threshold=5.0) == pumice.LLMInt8(threshold=5.0)
    assert make_recipe("llm-int8") == pumice.LLMInt8()


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        pumice.LLMInt8().threshold = 3.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: make_recipe("int5"),
            ValueError,
            "unknown recipe 'int5'; there are: .*int8, llm_int8",
        ),
        (
            lambda: make_recipe("int8", bits=3),
            ValueError,
            "no setting 'bits'.*activations, weights",
        ),
        (lambda: recipe_from_dict({"threshold": 1.0}), ValueError, "mapping with a 'name'"),
        (lambda: pumice.RTN(bits=5), ValueError, r"RTN: bits must be one of \(2, 3, 4, 8\), not 5"),
        (lambda: pumice.RTN(group_size=40), ValueError, "multiple of 16, or -1.*not 40"),
        (lambda: pumice.GPTQ(group_size=1.5), TypeError, "GPTQ: group_size must be an integer"),
        (lambda: pumice.GPTQ(damp=-0.1), ValueError, "GPTQ: damp must be in 0 … 1, not -0.1"),
        (lambda: pumice.GPTQ(damp="x"), TypeError, "GPTQ: damp must be a number"),
        (lambda: pumice.GPTQ(block_size=0), ValueError, "block_size must be a positive integer"),
        (lambda: pumice.AWQ(grid=0), ValueError, "AWQ: grid must be a positive integer, not 0"),
        (lambda: pumice.AWQScaling(bits=True), ValueError, "AWQScaling: bits must be one of"),
        (lambda: pumice.LLMInt8(threshold=0.0), ValueError, "LLMInt8: threshold must be positive"),
        (lambda: pumice.LLMInt8(threshold=float("nan")), ValueError, "threshold must be positive"),
        (lambda: pumice.LLMInt8(threshold="6"), TypeError, "threshold must be a float, not str"),
        (lambda: pumice.LLMInt8(per_element=1), TypeError, "per_element must be a bool"),
        (lambda: pumice.Int8(weights="per_row"), ValueError, "weights must be one of.*'per_row'"),
    ],
)
def test_bad_settings_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_recipes_make_their_layers():
    linear = nn.Linear(12, 7)
    mixed = pumice.LLMInt8(threshold=2.0, per_element=True).compress_linear(linear)
    assert isinstance(mixed, Int8MixedLinear)
    assert mixed.threshold == 2.0
    assert mixed.per_element
    plain = pumice.Int8(activations="per_tensor", weights="per_tensor").compress_linear(linear)
    assert isinstance(plain, Int8Linear)
    assert plain.activations == "per_tensor"
    assert plain.weight_scale.shape == (1,)
    # The same rounding of the weight, for both quantize it by rows.
    rows = pumice.Int8().compress_linear(linear)
    assert torch.equal(rows.qweight, mixed.qweight)
