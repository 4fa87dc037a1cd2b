"""Pruning whole models on the calibration engine."""

import copy
import json

import pytest
import torch
from torch import nn

import pumice
from pumice.calibration import Block
from pumice.prune.pattern import NofM, check_n_of_m
from tiny_lm import BLOCK_LINEARS, IDS, TinyLm, assert_unchanged, state_of
from tiny_transformers import build, samples

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")

FAMILIES = ["llama", "qwen2", "mistral", "gemma", "opt", "pythia"]


def weights_of(model):
    names = [row.name for row in pumice.report(model).layers]
    return {name: model.get_submodule(name).weight for name in names}


def error(model, exact, data):
    with torch.no_grad():
        return sum(
            float((model(x).logits - y).square().sum()) for x, y in zip(data, exact, strict=True)
        )


def mean_error(model):
    rows = pumice.report(model).layers
    return sum(row.relative_error for row in rows) / len(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("amount", [{"ratio": 0.5}, {"pattern": "2:4"}], ids=["50%", "2:4"])
def test_the_papers_order_holds_in_every_family(family, amount):
    """Output error of the layers: magnitude worst, then Wanda, SparseGPT best."""
    model, data = build(family), samples(8)
    before = state_of(model)
    found = []
    for method in (pumice.Magnitude, pumice.Wanda, pumice.SparseGPT):
        pruned = pumice.compress(model, method(**amount, store="dense"), data)
        assert_unchanged(model, before)
        for name, weight in weights_of(pruned).items():
            assert type(pruned.get_submodule(name)) is nn.Linear
            if "pattern" in amount:
                check_n_of_m(weight, NofM(2, 4), name)
            assert abs(float((weight == 0).float().mean()) - 0.5) < 0.02
        assert all(abs(row.sparsity - 0.5) < 0.02 for row in pumice.report(pruned).layers)
        found.append(mean_error(pruned))
    magnitude, wanda, sparsegpt = found
    assert sparsegpt < 0.95 * wanda
    assert wanda < 0.95 * magnitude


def test_later_blocks_see_what_the_pruned_ones_before_them_give():
    model, data = TinyLm(), [IDS] * 4
    seen = {}
    original = Block.replace

    def replace(self, name, layer):
        original(self, name, layer)
        seen[self.full_name(name)] = self.layers[name].weight.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "replace", replace)
        result = pumice.compress(model, pumice.SparseGPT(0.5), data)
    for name in BLOCK_LINEARS:
        assert torch.equal(seen[name], result.get_submodule(name).weight)


def test_ratios_by_name():
    model, data = build("llama"), samples(4)
    ratios = {"q_proj": 0.0, "model.layers.1.*": 0.75, "*": 0.25}
    for method in (pumice.Magnitude, pumice.Wanda, pumice.SparseGPT):
        result = pumice.compress(model, method(ratios), data)
        for row in pumice.report(result).layers:
            expected = 0.0 if "q_proj" in row.name else 0.75 if "layers.1" in row.name else 0.25
            assert row.sparsity == pytest.approx(expected, abs=0.01)
        q_proj = "model.layers.0.self_attn.q_proj"
        assert torch.equal(result.get_submodule(q_proj).weight, model.get_submodule(q_proj).weight)


def test_a_layer_without_a_ratio_is_named():
    for method in (pumice.Magnitude, pumice.Wanda, pumice.SparseGPT, pumice.PruneAndTune):
        with pytest.raises(ValueError, match=r"layer 'blocks\.0\.down'.*no pattern of ratio fits"):
            pumice.compress(TinyLm(), method({"up": 0.5}), [IDS] * 4, include=BLOCK_LINEARS)


def test_layers_outside_of_the_blocks_are_pruned_by_magnitude():
    model = TinyLm()
    for method in (pumice.Wanda, pumice.SparseGPT):
        result = pumice.compress(model, method({"lm_head": 0.3, "*": 0.6}), [IDS] * 4, exclude=())
        head = result.lm_head.weight
        gone = head == 0
        assert float(gone.float().mean()) == pytest.approx(0.3, abs=0.02)
        assert torch.equal(head[~gone], model.lm_head.weight[~gone])
        rows = model.lm_head.weight.detach().abs()
        if method is pumice.Wanda:
            assert bool((rows.masked_fill(~gone, 0).amax(1) <= _least_kept(rows, gone)).all())
        else:
            assert float(rows[gone].max()) <= float(rows[~gone].min())


def _least_kept(weight, gone):
    return weight.masked_fill(gone, float("inf")).amin(1)


@pytest.mark.parametrize(
    "recipe",
    [pumice.Magnitude(0.6), pumice.Wanda(0.6), pumice.SparseGPT(0.6)],
    ids=lambda r: r.name,
)
def test_scaling_by_awq_can_come_before(recipe):
    """The fold changes norms before the layers; what is pruned is the scaled weight."""
    model, data = build("llama"), samples(4)
    result = pumice.compress(model, [pumice.AWQScaling(2, 16, grid=8), recipe], data)
    norms = [name for name, _ in model.named_parameters() if "layernorm" in name]
    assert any(
        not torch.equal(result.get_parameter(name), model.get_parameter(name)) for name in norms
    )
    assert all(row.sparsity == pytest.approx(0.6, abs=0.02) for row in pumice.report(result).layers)
    exact = [model(x).logits.detach() for x in data]
    dense = sum(float(y.square().sum()) for y in exact)
    assert error(result, exact, data) < dense


def test_rounding_after_pruning_keeps_the_zeros():
    model, data = build("llama"), samples(4)
    for symmetric in (True, False):
        pruned = pumice.compress(model, pumice.SparseGPT(0.5), data)
        result = pumice.compress(pruned, pumice.RTN(4, 32, symmetric=symmetric))
        for name, weight in weights_of(pruned).items():
            rounded = result.get_submodule(name).dequantize()
            assert bool((rounded[weight == 0] == 0).all())


def test_pruning_and_quantizing_at_once_is_better_than_rounding_afterwards():
    model, data = build("llama"), samples(8)
    kwargs = {"pattern": "2:4", "store": "dense"}
    joint = pumice.compress(model, pumice.SparseGPT(**kwargs, bits=3, group_size=16), data)
    pruned = pumice.compress(model, pumice.SparseGPT(**kwargs), data)
    apart = pumice.compress(pruned, pumice.RTN(3, 16))
    for name in weights_of(joint):
        check_n_of_m(joint.get_submodule(name).dequantize(), NofM(2, 4), name)
    exact = [model(x).logits.detach() for x in data]
    assert error(joint, exact, data) < error(apart, exact, data)


def test_the_report_says_how_many_zeros_there_are(capsys):
    result = pumice.compress(TinyLm(), pumice.Wanda(0.75), [IDS] * 4)
    report = pumice.report(result)
    text = str(report)
    assert "zeros" in text.splitlines()[1]
    assert text.count("75.00%") == 4
    assert all(0 < row.relative_error < 1 for row in report.layers)
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["sparsity"] == 0.75
    rounded = pumice.report(pumice.compress(TinyLm(), pumice.RTN(4, 16)))
    assert rounded.layers[0].sparsity is None
    assert "zeros" not in str(rounded)


def test_a_pruned_model_is_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors")
    model, data = build("llama"), samples(4)
    pruned = pumice.compress(model, pumice.SparseGPT(0.5), data)
    pumice.save(pruned, tmp_path / "ours")
    loaded = pumice.load(tmp_path / "ours")
    assert pumice.report(loaded) == pumice.report(pruned)
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    # To transformers it is an ordinary model.
    pruned.save_pretrained(tmp_path / "theirs")
    assert "quantization_config" not in json.loads((tmp_path / "theirs/config.json").read_text())
    theirs = type(model).from_pretrained(tmp_path / "theirs")
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor)


def test_a_pruned_model_can_be_pruned_further():
    model, data = TinyLm(), [IDS] * 4
    once = pumice.compress(model, pumice.Wanda(0.5), data)
    twice = pumice.compress(once, pumice.Wanda(0.75), data)
    for name in BLOCK_LINEARS:
        gone = once.get_submodule(name).weight == 0
        assert bool((twice.get_submodule(name).weight[gone] == 0).all())
    assert [recipe["ratio"] for recipe in pumice.report(twice).recipes] == [0.5, 0.75]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, data = build("llama").to(dtype), samples(4)
    for method in (pumice.Magnitude, pumice.Wanda, pumice.SparseGPT):
        result = pumice.compress(copy.deepcopy(model), method(0.5), data)
        for name in weights_of(result):
            layer = result.get_submodule(name)
            assert layer.weight.dtype == dtype
            assert bool(layer.weight.isfinite().all())
        assert all(0 < row.relative_error < 0.6 for row in pumice.report(result).layers)
