"""Pruning recipes: settings, storage, and what one layer becomes."""

import json

import pytest
import torch
from torch import nn

import pumice
from pumice.prune.pattern import NofM, check_n_of_m
from pumice.quantize import make_recipe, recipe_from_dict, recipe_names

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


@pytest.mark.parametrize(
    "recipe",
    [
        pumice.Magnitude(),
        pumice.Magnitude(0.7, compare="row"),
        pumice.Wanda({"q_proj": 0.1, "*": 0.5}, compare="layer"),
        pumice.Wanda(pattern="4:8"),
        pumice.SparseGPT(pattern="2:4", bits=4, group_size=64, symmetric=False, store="dense"),
        pumice.SparseGPT(0.9, damp=0.1, block_size=64),
        pumice.PruneAndTune(0.7, criterion="wanda", rank=8, objective="teacher", seed=3),
    ],
)
def test_storage_round_trip(recipe):
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_they_are_found_by_name():
    assert {"magnitude", "wanda", "sparsegpt", "prune_and_tune"} <= set(recipe_names())
    assert make_recipe("prune-and-tune", ratio=0.7) == pumice.PruneAndTune(0.7)


METHODS = [pumice.Magnitude, pumice.Wanda, pumice.SparseGPT, pumice.PruneAndTune]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ratio": 1.0}, ValueError, r"ratio.*must be in \[0, 1\), not 1.0"),
        ({"ratio": -0.5}, ValueError, r"must be in \[0, 1\), not -0.5"),
        ({"ratio": "half"}, TypeError, "ratio must be a number, not 'half'"),
        ({"ratio": {}}, ValueError, "ratio is an empty mapping"),
        ({"ratio": {"q_proj": 2}}, ValueError, r"'q_proj': ratio.*\[0, 1\), not 2"),
        ({"ratio": {1: 0.5}}, TypeError, "must map name patterns, not 1"),
        ({"pattern": "2/4"}, ValueError, "pattern must be like '2:4'"),
        ({"pattern": "2:4", "ratio": 0.5}, ValueError, "pass ratio or pattern, not both"),
        ({"store": "csr"}, ValueError, "store must be one of.*not 'csr'"),
    ],
)
def test_bad_settings_are_named(method, settings, error, message):
    with pytest.raises(error, match=f"{method.__name__}: .*{message}|{method.__name__}: {message}"):
        method(**settings)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pumice.Wanda(compare="column"), ValueError, "Wanda: compare must be one of"),
        (lambda: pumice.Magnitude(compare=None), ValueError, "Magnitude: compare must be one of"),
        (lambda: pumice.SparseGPT(damp=2), ValueError, "SparseGPT: damp must be in 0 … 1, not 2"),
        (lambda: pumice.SparseGPT(damp=True), TypeError, "SparseGPT: damp must be a number"),
        (lambda: pumice.SparseGPT(block_size=0), ValueError, "block_size must be a positive"),
        (lambda: pumice.SparseGPT(bits=5), ValueError, "SparseGPT: bits must be one of"),
        (
            lambda: pumice.SparseGPT(pattern="3:5", bits=4, group_size=64),
            ValueError,
            "group_size must be a multiple of 5, for the pattern 3:5, not 64",
        ),
        (
            lambda: pumice.PruneAndTune(criterion="gptq"),
            ValueError,
            "criterion must be one of.*not 'gptq'",
        ),
        (lambda: pumice.PruneAndTune(rounds=0), ValueError, "rounds must be an integer from 1"),
        (lambda: pumice.PruneAndTune(rank=-1), ValueError, "rank must be an integer from 0"),
        (lambda: pumice.PruneAndTune(learning_rate=0), ValueError, r"learning_rate must be in \("),
        (lambda: pumice.PruneAndTune(objective="mse"), ValueError, "objective must be one of"),
    ],
)
def test_bad_settings_of_a_method_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_ratio_leaves_a_dense_layer_with_zeros(dtype, bias):
    torch.manual_seed(0)
    linear = nn.Linear(37, 11, bias=bias).to(dtype).eval()
    before = linear.weight.detach().clone()
    layer = pumice.compress(linear, pumice.Magnitude(0.6))
    assert type(layer) is nn.Linear
    assert layer.weight.dtype == dtype
    assert not layer.training
    assert torch.equal(linear.weight, before)
    gone = layer.weight == 0
    assert int(gone.sum()) == round(0.6 * 37 * 11)
    assert torch.equal(layer.weight[~gone], before[~gone])
    assert before[gone].abs().max() <= before[~gone].abs().min()
    x = torch.randn(3, 37, dtype=dtype)
    expected = nn.functional.linear(x, before * ~gone, linear.bias)
    assert torch.equal(layer(x), expected)
    layer.weight.data.fill_(1.0)  # its memory is its own
    assert torch.equal(linear.weight, before)


def test_rows_or_the_whole_layer_compete():
    torch.manual_seed(0)
    linear = nn.Linear(20, 4, bias=False)
    linear.weight.data.mul_(torch.tensor([[1.0], [10.0], [100.0], [1000.0]]))
    by_row = pumice.compress(linear, pumice.Magnitude(0.5, compare="row"))
    of_all = pumice.compress(linear, pumice.Magnitude(0.5, compare="layer"))
    assert (by_row.weight == 0).sum(1).tolist() == [10] * 4
    assert (of_all.weight == 0).sum(1).tolist()[0] == 20


@pytest.mark.parametrize("pattern", ["4:8", "1:2", "3:5"])
def test_patterns_other_than_2_of_4_stay_dense(pattern):
    torch.manual_seed(0)
    layer = pumice.compress(nn.Linear(40, 6), pumice.Magnitude(pattern=pattern))
    assert type(layer) is nn.Linear
    check_n_of_m(layer.weight, NofM.parse(pattern, ""), "the weight")
    report = pumice.report(layer).layers[0]
    assert report.sparsity == pytest.approx(NofM.parse(pattern, "").ratio)


@pytest.mark.parametrize("method", [pumice.Magnitude, pumice.Wanda, pumice.SparseGPT])
def test_inputs_that_are_no_multiple_of_m_are_refused_by_name(method):
    model = nn.Sequential(nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 8))
    with pytest.raises(
        ValueError, match=r"layer '2': .*2:4 needs a multiple of 4 inputs, but the layer has 30"
    ):
        pumice.compress(model, method(pattern="2:4"), [torch.randn(64, 16)])


@pytest.mark.parametrize("method", [pumice.Magnitude, pumice.Wanda, pumice.SparseGPT])
def test_weights_that_are_not_finite_are_refused_by_name(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data[3, 2] = float("nan")
    with pytest.raises(
        ValueError, match=rf"layer '1': {method.__name__}: the weight holds NaN.*\(rows 3\)"
    ):
        pumice.compress(model, method(), [torch.randn(64, 8)])


@pytest.mark.parametrize("method", [pumice.Wanda, pumice.SparseGPT, pumice.PruneAndTune])
def test_calibration_is_asked_for(method):
    with pytest.raises(ValueError, match="needs calibration data"):
        pumice.compress(nn.Linear(8, 8), method())


@pytest.mark.parametrize("method", [pumice.Wanda, pumice.SparseGPT])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.index_fill(1, torch.tensor([2]), float("nan")), "NaN or infinite"),
        (lambda x: x.index_fill(1, torch.tensor([5]), float("inf")), "NaN or infinite"),
        (torch.zeros_like, "dead"),
    ],
)
def test_calibration_that_says_nothing_is_refused_by_name(method, spoil, message):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=rf"layer '0'.*{message}"):
        pumice.compress(model, method(), [spoil(torch.randn(64, 8))])


def test_wanda_multiplies_by_the_norm_of_the_input():
    """Against the formula, on inputs so large that fp32 squares would overflow."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 6)
    x = torch.randn(50, 24) * torch.logspace(-3, 25, 24)
    for compare in ("row", "layer"):
        layer = pumice.compress(linear, pumice.Wanda(0.5, compare=compare), [x[:20], x[20:]])
        score = linear.weight.double().abs() * x.double().norm(dim=0)
        if compare == "row":
            limit = score.sort(1).values[:, 11:12]
        else:
            limit = score.flatten().sort().values[71]
        assert torch.equal(layer.weight == 0, score <= limit)


def test_inputs_that_were_never_active_go_first():
    torch.manual_seed(0)
    linear = nn.Linear(16, 4)
    x = torch.randn(64, 16)
    x[:, [1, 5, 6]] = 0.0
    for method in (pumice.Wanda, pumice.SparseGPT):
        layer = pumice.compress(linear, method(0.25), [x])
        assert bool((layer.weight[:, [1, 5, 6]] == 0).all())


def test_integers_of_another_pattern_hold_zero_points_where_weights_are_gone():
    torch.manual_seed(0)
    linear = nn.Linear(64, 16)
    recipe = pumice.SparseGPT(0.6, bits=4, group_size=32, symmetric=False)
    layer = pumice.compress(linear, recipe, [torch.randn(500, 64)])
    assert isinstance(layer, pumice.nn.Int4Linear)
    weight = layer.dequantize()
    assert int((weight == 0).sum()) >= round(0.6 * 64 * 16)
    assert pumice.report(layer).layers[0].sparsity >= 614 / 1024
