"""Checkpoints of bitsandbytes' int8 layers, made here as its documentation describes them."""

import pytest
import torch
from torch import nn

from pumice.integrations import bitsandbytes
from pumice.nn import Int8MixedLinear

X = torch.linspace(-4, 4, 5 * 16).reshape(5, 16)


def make_model(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    with torch.device(device):
        return nn.Sequential(
            nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4, bias=False), nn.Linear(4, 2)
        )


def bnb_state_dict(model: nn.Sequential, quantized: tuple[str, ...] = ("0", "2")) -> dict:
    """weight = round(127 · W / SCB), SCB = max |W| of the row."""
    state = {}
    for name, tensor in model.state_dict().items():
        layer, _, entry = name.partition(".")
        if layer in quantized and entry == "weight":
            absmax = tensor.abs().amax(1)
            state[f"{layer}.weight"] = (tensor / absmax[:, None] * 127).round().to(torch.int8)
            state[f"{layer}.SCB"] = absmax
            state[f"{layer}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        else:
            state[name] = tensor
    return state


def first_layer() -> dict:
    state = bnb_state_dict(make_model())
    return {name[2:]: tensor for name, tensor in state.items() if name.startswith("0.")}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_whole_state_dict_loads(device):
    model = make_model()
    state = bnb_state_dict(model)
    loaded = bitsandbytes.load_state_dict(make_model(device), state, threshold=5.0)
    assert [type(module) for module in loaded] == [
        Int8MixedLinear,
        nn.ReLU,
        Int8MixedLinear,
        nn.Linear,
    ]
    assert loaded[0].threshold == 5.0
    expected = state["0.weight"].float() * state["0.SCB"][:, None] / 127
    torch.testing.assert_close(loaded[0].dequantize(), expected, rtol=1e-6, atol=0)
    exact = model(X)
    assert (loaded(X) - exact).norm() < 0.02 * exact.norm()
    assert state.keys() == bnb_state_dict(model).keys()  # not changed


def test_the_quantization_is_ours_too():
    """Row-wise absmax: the same integers, but where another rounding of the inverse decides."""
    linear = make_model()[0]
    ours = Int8MixedLinear.from_linear(linear)
    theirs = Int8MixedLinear(16, 24)
    theirs.load_state_dict(first_layer())
    assert (ours.qweight - theirs.qweight).abs().max() <= 1
    assert (ours.qweight != theirs.qweight).float().mean() < 0.01
    torch.testing.assert_close(ours.weight_scale, theirs.weight_scale, rtol=1e-6, atol=0)


def test_a_layers_own_state_dict_loads_strictly():
    layer = Int8MixedLinear(16, 24)
    state = first_layer()
    result = layer.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(layer.qweight, state["weight"])
    assert set(layer.state_dict()) == {"qweight", "weight_scale", "bias"}


def test_inside_a_model_with_other_layers():
    deep = nn.Sequential(Int8MixedLinear(16, 24))
    model = nn.ModuleDict({"deep": deep, "other": nn.Linear(2, 2)})
    state = {f"deep.0.{name}": tensor for name, tensor in first_layer().items()}
    state.update({f"other.{name}": t for name, t in model["other"].state_dict().items()})
    model.load_state_dict(state)
    assert torch.equal(model["deep"][0].qweight, state["deep.0.weight"])


def test_conversion_passes_the_rest_through():
    state = bnb_state_dict(make_model(), quantized=("2",))
    converted = bitsandbytes.convert_state_dict(state)
    assert set(converted) == {
        "0.weight",
        "0.bias",
        "2.qweight",
        "2.weight_scale",
        "3.weight",
        "3.bias",
    }
    assert converted["0.weight"] is state["0.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight"), r"0\.SCB is present, so 0\.weight must be.*missing"),
        (lambda s: s.update({"0.weight": torch.ones(24, 16)}), r"0\.weight must be an int8 matrix"),
        (lambda s: s.update({"0.SCB": torch.ones(23)}), r"0\.SCB must hold.*24 rows.*not 23"),
        (
            lambda s: s.update({"2.weight_format": torch.tensor(2)}),
            r"2\.weight_format is 2: only row-major",
        ),
        (lambda s: s.pop("3.bias"), r"3\.bias"),
        (lambda s: s.update({"9.weight": torch.ones(1)}), r"9\.weight"),
    ],
)
def test_malformed_state_dicts_are_refused(change, message):
    state = bnb_state_dict(make_model())
    change(state)
    model = make_model()
    modules = list(model)
    with pytest.raises(ValueError, match=message):
        bitsandbytes.load_state_dict(model, state)
    assert list(model) == modules


def test_no_int8_layer_at_all():
    with pytest.raises(ValueError, match="no int8 layer of bitsandbytes"):
        bitsandbytes.convert_state_dict(make_model().state_dict())


def test_a_layer_that_the_model_lacks():
    state = bnb_state_dict(make_model())
    with pytest.raises(ValueError, match="Sequential has no module '2'"):
        bitsandbytes.load_state_dict(make_model()[:2], state)
