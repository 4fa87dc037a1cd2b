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
