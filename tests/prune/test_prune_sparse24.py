"""What 2:4 weights become: Sparse24Linear, floating or of 4-bit integers."""

import copy

import pytest
import torch
from torch import nn

import pumice
from pumice.nn import Int4Linear, Sparse24Linear
from pumice.prune.pattern import NofM, check_n_of_m
from tiny_transformers import build, samples

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
METHODS = [pumice.Magnitude, pumice.Wanda, pumice.SparseGPT]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_the_layer_multiplies_with_the_weight_that_the_method_left(method, pattern, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(36, 10).to(dtype)
    x = [torch.randn(90, 36, dtype=dtype)]
    sparse = pumice.compress(linear, method(pattern=pattern), x)
    dense = pumice.compress(linear, method(pattern=pattern, store="dense"), x)
    assert isinstance(sparse, Sparse24Linear)
    assert type(dense) is nn.Linear
    check_n_of_m(dense.weight, NofM.parse(pattern, ""), "the weight")
    assert torch.equal(sparse.dequantize(dtype), dense.weight)
    assert torch.equal(sparse.bias, dense.bias)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(sparse(x[0]), dense(x[0]), rtol=tolerance, atol=tolerance)
    share = 0.5 if pattern == "2:4" else 0.75
    for layer in (sparse, dense):
        row = pumice.report(layer).layers[0]
        assert row.sparsity == pytest.approx(share, abs=0.01)
    assert pumice.report(sparse).layers[0].bytes_after < 0.7 * row.bytes_after


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_integers(symmetric, group_size):
    torch.manual_seed(0)
    linear = nn.Linear(128, 24)
    x = torch.randn(600, 128)
    settings = {"bits": 4, "group_size": group_size, "symmetric": symmetric}
    sparse = pumice.compress(linear, pumice.SparseGPT(pattern="2:4", **settings), [x])
    dense = pumice.compress(linear, pumice.SparseGPT(pattern="2:4", store="dense", **settings), [x])
    assert isinstance(sparse, Sparse24Linear)
    assert isinstance(dense, Int4Linear)
    weight = dense.dequantize()
    check_n_of_m(weight, NofM(2, 4), "the weight")
    assert torch.equal(sparse.dequantize(), weight)
    expected = nn.functional.linear(x, weight, linear.bias)
    torch.testing.assert_close(sparse(x), expected, rtol=1e-3, atol=1e-3)
    report = pumice.report(sparse).layers[0]
    assert report.bytes_after < pumice.report(dense).layers[0].bytes_after
    assert 0 < report.relative_error < 0.6


def test_a_model(tmp_path):
    model, data = build("llama"), samples(8)
    recipe = pumice.SparseGPT(pattern="2:4", bits=4, group_size=32)
    result = pumice.compress(model, recipe, data)
    rows = pumice.report(result).layers
    assert {row.layer for row in rows} == {"Sparse24Linear"}
    pumice.save(result, tmp_path / "ours")
    loaded = pumice.load(tmp_path / "ours")
    for name, tensor in result.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    with torch.no_grad():
        assert torch.equal(loaded(data[0]).logits, result(data[0]).logits)
        twin = copy.deepcopy(result)
        assert torch.equal(twin(data[0]).logits, result(data[0]).logits)
    assert pumice.report(loaded) == pumice.report(result)


def test_from_pretrained_opens_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("pumice.integrations.transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 5 opens pumice checkpoints")
    model, data = build("llama"), samples(4)
    result = pumice.compress(model, pumice.Wanda(pattern="2:4"), data)
    result.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(opened(data[0]).logits, result(data[0]).logits)


def test_tuned_weights_are_stored_sparse(tmp_path):
    model, data = build("llama"), samples(4)
    recipe = pumice.PruneAndTune(pattern="2:4", steps=2, batch=1)
    result = pumice.compress(model, recipe, data)
    assert {row.layer for row in pumice.report(result).layers} == {"Sparse24Linear"}
