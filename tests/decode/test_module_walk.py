"""A walk through a model's modules that is not repeated, and what it must notice."""

from __future__ import annotations

import copy

import pytest
import torch
from forward_passes import alone, prompts, runner_of
from torch import nn

from decoders import build
from pumice.decode import PagedBatch
from pumice.decode.modules import ModuleWalk


def tree():
    return nn.ModuleDict(
        {"a": nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())])}
    )


CHANGES = {
    "exchanged": lambda m: setattr(m.a[1], "0", nn.Linear(2, 2)),
    "exchanged in a list": lambda m: m.a.__setitem__(0, nn.Identity()),
    "added": lambda m: m.a[1].add_module("more", nn.Tanh()),
    "added to a leaf's place": lambda m: m.a.append(nn.Sequential(nn.ReLU())),
    "taken out": lambda m: m.a.__delitem__(0),
    "set to None": lambda m: m.a[1]._modules.__setitem__("1", None),
    "exchanged at the top": lambda m: m.update({"a": nn.ModuleList([nn.Tanh()])}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_modules_are_those_of_a_fresh_walk(change):
    model = tree()
    walk = ModuleWalk(model)
    first = walk()
    assert first == list(model.modules())
    assert walk() is first
    change(model)
    assert walk() is not first
    assert walk() == list(model.modules()) != first
    assert walk() is walk()


def test_a_module_that_stands_in_two_places_is_one():
    model = tree()
    model["b"] = model["a"][0]
    assert ModuleWalk(model)() == list(model.modules())


def test_a_model_without_modules_is_its_own_only_one():
    model = nn.ReLU()
    walk = ModuleWalk(model)
    assert walk() == [model]
    assert walk() is walk()


@torch.no_grad()
def test_layers_that_are_exchanged_between_passes_take_part_in_the_next():
    """With a configuration and a mode of their own, as those of another model have."""
    model, other = build("llama"), build("llama")
    for parameter in other.parameters():
        parameter.mul_(1.1)
    text = prompts(9)[0]
    runner, manager = runner_of(model)

    def logits():
        sequence = manager.allocate(text).id
        batch = PagedBatch.from_step(runner.pool, manager.view([sequence], [9]), [text])
        found = runner.forward(batch)
        manager.free([sequence])
        return found

    torch.testing.assert_close(logits(), alone(model, text), rtol=1e-4, atol=1e-4)
    layer = copy.deepcopy(other).train().model.layers[1]
    layer.self_attn.attention_dropout = 0.9  # of training only
    model.model.layers[1] = layer
    assert layer.self_attn.config is not model.config
    found = logits()
    assert layer.training
    assert not model.model.layers[0].training
    assert layer.self_attn.config._attn_implementation == "eager"
    layer.eval()
    torch.testing.assert_close(found, alone(model, text), rtol=1e-4, atol=1e-4)
