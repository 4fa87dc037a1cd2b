"""Int8Linear: W8A8 as a layer."""

import copy

import pytest
import torch
from torch import nn

from pumice.nn import Int8Linear, layer_from_config

GRANULARITIES = [
    (activations, weights)
    for activations in ("per_token", "per_tensor")
    for weights in ("per_channel", "per_tensor")
]


def make(n: int = 19, k: int = 45, m: int = 13) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(k, n)
    return linear, torch.randn(m, k) * torch.rand(m, 1) * 3


def quantized(values: torch.Tensor, *, whole: bool) -> torch.Tensor:
    """Round to 127 steps of the absolute maximum, in float64: what int8 holds."""
    absmax = values.abs().max() if whole else values.abs().amax(-1, keepdim=True)
    step = absmax / 127
    return (values / step).round() * step


@pytest.mark.parametrize(("activations", "weights"), GRANULARITIES)
def test_output_is_the_product_of_the_quantized_factors(activations, weights):
    linear, x = make()
    layer = Int8Linear.from_linear(linear, activations=activations, weights=weights)
    weight = quantized(linear.weight.detach().double(), whole=weights == "per_tensor")
    x_hat = quantized(x.double(), whole=activations == "per_tensor")
    expected = x_hat @ weight.T + linear.bias.detach().double()
    # A value next to the middle between two steps may round the other way in fp32.
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=2e-3)
    assert layer.weight_scale.numel() == (1 if weights == "per_tensor" else 19)


def test_finer_granularity_is_more_exact():
    linear, x = make(64, 128, 64)
    exact = x.double() @ linear.weight.detach().double().T + linear.bias.detach().double()

    def error(activations, weights):
        layer = Int8Linear.from_linear(linear, activations=activations, weights=weights)
        return (layer(x).double() - exact).norm()

    assert error("per_token", "per_channel") < 0.8 * error("per_tensor", "per_tensor")


def test_one_outlier_ruins_the_per_tensor_scale():
    """The failure that LLM.int8() was made for."""
    linear, x = make(64, 128, 64)
    x[3, 7] = 300.0
    exact = x.double() @ linear.weight.detach().double().T + linear.bias.detach().double()
    rows = [row for row in range(64) if row != 3]

    def error(activations):
        layer = Int8Linear.from_linear(linear, activations=activations)
        return ((layer(x).double() - exact)[rows].norm() / exact[rows].norm()).item()

    assert error("per_tensor") > 0.3
    assert error("per_token") < 0.02


def test_smoothing_moves_the_outlier_into_the_weight():
    linear, x = make(64, 128, 64)
    x[:, 7] *= 100
    exact = x.double() @ linear.weight.detach().double().T + linear.bias.detach().double()
    smooth = torch.ones(128)
    smooth[7] = 0.1
    plain = Int8Linear.from_linear(linear)
    smoothed = Int8Linear.from_linear(linear, smooth=smooth)
    assert (smoothed(x) - exact).norm() < 0.5 * (plain(x) - exact).norm()
    # The same function as a whole, to within half a step of the widened weight (0.88 / 127 / 2).
    torch.testing.assert_close(smoothed.dequantize(), linear.weight.detach(), rtol=0, atol=4e-3)
    assert smooth.data_ptr() != smoothed.smooth.data_ptr()


def test_static_activation_scale():
    linear, x = make()
    scale = x.abs().max() / 127
    static = Int8Linear.from_linear(linear, activations="per_tensor", activation_scale=float(scale))
    dynamic = Int8Linear.from_linear(linear, activations="per_tensor")
    torch.testing.assert_close(static(x), dynamic(x), rtol=0, atol=1e-2)
    # Beyond the calibrated range values are clamped, not wrapped.
    weight = static.dequantize()
    clamped = (x * 50 / scale).round().clamp(-127, 127) * scale @ weight.T + linear.bias
    torch.testing.assert_close(static(x * 50), clamped, rtol=0, atol=2e-3)


def test_state_dict_and_config_round_trip():
    linear, x = make()
    layer = Int8Linear.from_linear(
        linear, activations="per_tensor", activation_scale=0.05, smooth=torch.rand(45) + 0.5
    )
    assert set(layer.state_dict()) == {
        "qweight",
        "weight_scale",
        "activation_scale",
        "smooth",
        "bias",
    }
    other = layer_from_config(layer.config())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_casting_keeps_scales_in_fp32():
    linear, x = make()
    layer = Int8Linear.from_linear(linear, smooth=torch.full((45,), 1 / 3))
    layer.bfloat16()
    assert layer.weight_scale.dtype == torch.float32
    assert layer.smooth.dtype == torch.float32
    assert torch.equal(layer.smooth, torch.full((45,), 1 / 3))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_backward_refuses():
    linear, x = make()
    layer = Int8Linear.from_linear(linear)
    with pytest.raises(RuntimeError, match=r"int8_linear is not differentiable.*Int8MixedLinear"):
        layer(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activations": "per_row"}, "activations must be one of.*per_token.*'per_row'"),
        ({"weights": "per_token"}, "weights must be one of.*per_channel.*'per_token'"),
        ({"activation_scale": 0.1}, "static activation scale.*per_tensor"),
        ({"activations": "per_tensor", "activation_scale": -1.0}, "activation_scale.*positive"),
        ({"smooth": torch.ones(44)}, "smooth must hold 45 numbers, not \\[44\\]"),
        ({"smooth": torch.zeros(45)}, "smooth must be positive"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    linear, _ = make()
    with pytest.raises(ValueError, match=message):
        Int8Linear.from_linear(linear, **arguments)


def test_nan_weight_is_refused():
    linear, _ = make()
    with torch.no_grad():
        linear.weight[2, 0] = float("nan")
    for weights in ("per_channel", "per_tensor"):
        with pytest.raises(ValueError, match=r"NaN or infinite values \(rows 2\)"):
            Int8Linear.from_linear(linear, weights=weights)


@pytest.mark.parametrize(("activations", "weights"), GRANULARITIES)
def test_compiles_and_exports(activations, weights):
    linear, x = make()
    layer = Int8Linear.from_linear(linear, activations=activations, weights=weights)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    exported = torch.export.export(
        layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    ).module()
    with torch.no_grad():
        for m in (2, 7):
            assert torch.equal(compiled(x[:m]), layer(x[:m]))
            assert torch.equal(exported(x[:m]), layer(x[:m]))
