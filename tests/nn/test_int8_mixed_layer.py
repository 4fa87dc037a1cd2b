"""Int8MixedLinear: LLM.int8() as a layer."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from pumice.nn import Int8MixedLinear, layer_from_config
from pumice.ops import int8_mixed_linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_linear(n: int = 23, k: int = 37, *, bias: bool = True, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(n * 1000 + k)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def outlying(m: int, k: int, dtype=torch.float32) -> Tensor:
    """Activations with one column far above the rest."""
    torch.manual_seed(m)
    x = torch.randn(m, k)
    x[:, 5] *= 40
    return x.to(dtype)


def relative_error(y: Tensor, reference: Tensor) -> float:
    return float((y.double() - reference).norm().detach() / reference.norm().detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_near_that_of_the_linear_layer(dtype, bias):
    linear = make_linear(bias=bias, dtype=dtype)
    layer = Int8MixedLinear.from_linear(linear)
    x = outlying(11, 37, dtype)
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    y = layer(x)
    assert y.dtype == dtype
    assert relative_error(y, exact) < 0.02


def test_weight_is_within_half_a_step_of_the_original():
    linear = make_linear()
    layer = Int8MixedLinear.from_linear(linear)
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((layer.dequantize() - linear.weight).abs() <= step * 0.5001).all()
    assert layer.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_outlier_columns_keep_the_other_columns_exact():
    """With the outlier column in 16 bit the rest is quantized on its own, finer grid."""
    linear = make_linear(n=64, k=256)
    x = outlying(32, 256)
    exact = x.double() @ linear.weight.double().T + linear.bias.double()
    with_outliers = Int8MixedLinear.from_linear(linear, threshold=6.0)
    without = Int8MixedLinear.from_linear(linear, threshold=float("inf"))
    # Compare with the product of the dequantized weights, to leave out their own rounding.
    target = x.double() @ with_outliers.dequantize().double().T + linear.bias.double()
    assert relative_error(with_outliers(x), target) < 0.2 * relative_error(without(x), target)
    assert relative_error(with_outliers(x), exact) < 0.01


def test_settings_reach_the_operator():
    linear = make_linear()
    x = outlying(6, 37)
    for threshold, per_element in [(2.0, False), (2.0, True), (1e9, False)]:
        layer = Int8MixedLinear.from_linear(linear, threshold=threshold, per_element=per_element)
        expected = int8_mixed_linear(
            x,
            layer.qweight,
            layer.weight_scale,
            layer.bias,
            threshold=threshold,
            per_element=per_element,
        )
        assert torch.equal(layer(x), expected)


def test_per_element_rows_do_not_depend_on_their_neighbours():
    layer = Int8MixedLinear.from_linear(make_linear(), threshold=2.0, per_element=True)
    x = outlying(64, 37)
    assert torch.equal(layer(x)[:40], layer(x[:40]))


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double().float(),
        lambda m: m.type(torch.float16),
        lambda m: nn.Sequential(m).half()[0],
    ],
)
def test_casting_leaves_the_compressed_weight_alone(cast):
    layer = Int8MixedLinear.from_linear(make_linear())
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    cast(layer)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


def test_a_cast_model_computes_in_its_new_dtype():
    model = nn.Sequential(
        nn.Linear(8, 12), nn.GELU(), Int8MixedLinear.from_linear(make_linear(5, 12))
    )
    model.bfloat16()
    y = model(torch.randn(3, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert model[2].bias.dtype == torch.bfloat16


def test_copies_are_equal_and_independent():
    layer = Int8MixedLinear.from_linear(make_linear(), threshold=3.0, per_element=True)
    x = outlying(4, 37)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.config() == layer.config()
        other.qweight.zero_()
        assert layer.qweight.any()


def test_state_dict_round_trip():
    layer = Int8MixedLinear.from_linear(make_linear())
    state = layer.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "bias": torch.float32,
        "qweight": torch.int8,
        "weight_scale": torch.float32,
    }
    other = Int8MixedLinear(37, 23)
    other.load_state_dict(state)
    x = outlying(4, 37)
    assert torch.equal(other(x), layer(x))


def test_state_dict_of_the_wrong_dtype_is_refused_not_cast():
    layer = Int8MixedLinear(37, 23, bias=False)
    state = {"qweight": torch.randn(23, 37), "weight_scale": torch.ones(23)}
    with pytest.raises(TypeError, match=r"qweight must be torch\.int8.*torch\.float32"):
        layer.load_state_dict(state)


def test_config_rebuilds_the_layer():
    layer = Int8MixedLinear.from_linear(make_linear(bias=False), threshold=2.5, per_element=True)
    other = layer_from_config(layer.config(), device="meta")
    assert other.config() == layer.config()
    assert repr(other) == repr(layer)
    assert "threshold=2.5" in repr(layer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Int5Linear"}, "unknown layer type 'Int5Linear'.*Int8MixedLinear"),
        ({"threshold": -1.0}, "threshold must be positive"),
        ({"in_features": 0}, "in_features must be a positive integer, not 0"),
        ({"in_features": 1 << 17}, "in_features is 131072"),
        ({"colour": "red"}, "missing or unknown options.*colour"),
    ],
)
def test_bad_config_is_refused(change, message):
    config = {**Int8MixedLinear(4, 3).config(), **change}
    with pytest.raises(ValueError, match=message):
        layer_from_config(config)


def test_meta_device():
    linear = nn.Linear(16, 8, device="meta", dtype=torch.bfloat16)
    layer = Int8MixedLinear.from_linear(linear)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    y = layer(torch.empty(2, 5, 16, device="meta", dtype=torch.bfloat16))
    assert y.shape == (2, 5, 8)
    assert y.dtype == torch.bfloat16
    layer.to_empty(device="cpu")
    assert layer.qweight.dtype == torch.int8
    assert layer.weight_scale.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_by_row(value):
    linear = make_linear()
    with torch.no_grad():
        linear.weight[4, 2] = value
    with pytest.raises(ValueError, match=r"NaN or infinite values \(rows 4\)"):
        Int8MixedLinear.from_linear(linear)


def test_other_inputs_are_refused():
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, not Conv1d"):
        Int8MixedLinear.from_linear(nn.Conv1d(3, 3, 1))
    with pytest.raises(TypeError, match=r"weight must be float32.*float64"):
        Int8MixedLinear.from_linear(nn.Linear(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"threshold must be positive.*0"):
        Int8MixedLinear.from_linear(make_linear(), threshold=0)


def test_training_continues_around_the_frozen_weights():
    """An adapter before the frozen layer, and its bias, learn through it."""
    torch.manual_seed(0)
    frozen = Int8MixedLinear.from_linear(make_linear(16, 24))
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), frozen, nn.Linear(16, 4))
    before = {name: buffer.clone() for name, buffer in frozen.named_buffers()}
    x = torch.randn(64, 8)
    with torch.no_grad():
        target = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), frozen, model[3])(x) + 0.5
    optimizer = torch.optim.Adam([*model[0].parameters(), frozen.bias], lr=1e-2)
    losses = []
    for _ in range(100):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    for name, buffer in frozen.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_the_dequantized_layer(dtype):
    layer = Int8MixedLinear.from_linear(make_linear(dtype=dtype))
    x = outlying(7, 37, dtype).reshape(7, 1, 37).requires_grad_()
    dy = torch.randn(7, 1, 23, dtype=dtype)
    layer(x).backward(dy)
    expected = dy.double() @ layer.dequantize(torch.float64)
    tolerance = 3 * torch.finfo(dtype).eps
    assert x.grad.dtype == dtype
    assert relative_error(x.grad, expected) < tolerance
    assert layer.bias.grad.dtype == dtype
    assert relative_error(layer.bias.grad, dy.double().sum((0, 1))) < tolerance


def test_small_half_precision_gradients_do_not_vanish():
    """Scaling dy before the product would flush them to zero: 2e-7 · 1e-3 is no fp16 number."""
    linear = make_linear(dtype=torch.float16)
    layer = Int8MixedLinear.from_linear(linear)
    x = torch.randn(2, 37, dtype=torch.float16, requires_grad=True)
    layer(x).backward(torch.full((2, 23), 2e-5, dtype=torch.float16))
    expected = torch.full((2, 23), 2e-5).half().double() @ layer.dequantize(torch.float64)
    assert relative_error(x.grad, expected) < 0.02


def test_compiles_as_one_graph_with_any_number_of_rows():
    layer = Int8MixedLinear.from_linear(make_linear())
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (3, 8, 1):
        x = outlying(m, 37).requires_grad_()
        y = compiled(x)
        assert torch.equal(y, layer(x))
        y.sum().backward()
        assert x.grad.abs().sum() > 0


def test_exports_with_any_number_of_rows():
    layer = Int8MixedLinear.from_linear(make_linear())
    rows = torch.export.Dim.DYNAMIC
    exported = torch.export.export(layer, (outlying(4, 37),), dynamic_shapes=({0: rows},))
    for m in (2, 9):
        assert torch.equal(exported.module()(outlying(m, 37)), layer(outlying(m, 37)))
