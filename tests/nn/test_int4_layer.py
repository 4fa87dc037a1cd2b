"""Int4Linear: what it stores, what it computes, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

import pumice
from pumice.nn import Int4Linear, layer_from_config
from pumice.quantize.rtn import round_linear


def make(bits=4, group_size=16, zeros="none", permuted=False, n=7, k=40, bias=True, seed=0):
    """A layer of random contents, and the weight it stands for."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(k, n, bias)
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    q = torch.randint(0, 2**bits, (n, k), generator=generator).to(torch.uint8)
    scales = torch.rand(n, groups, generator=generator).add(0.1).half()
    z = {
        "none": None,
        "integer": torch.randint(0, 2**bits, (n, groups), generator=generator).to(torch.uint8),
        "float": (torch.rand(n, groups, generator=generator) * 8).half(),
    }[zeros]
    perm = torch.randperm(k, generator=generator) if permuted else None
    layer = Int4Linear.from_quantized(
        linear, q, scales, z, bits=bits, group_size=group_size, perm=perm
    )
    group = torch.arange(k) // size
    zero = 2.0 ** (bits - 1) if z is None else z.float()[:, group]
    stored = (q.float() - zero) * scales.float()[:, group]
    weight = stored.clone()
    if perm is not None:
        weight[:, perm] = stored
    return layer, weight, linear.bias


FORMS = [
    {},
    {"bits": 3, "zeros": "integer"},
    {"bits": 2, "permuted": True},
    {"bits": 8, "zeros": "float", "group_size": -1},
    {"zeros": "integer", "permuted": True, "group_size": 32, "bias": False},
    {"group_size": 128},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_computes_with_the_weight_it_stands_for(form, dtype):
    layer, weight, bias = make(**form)
    torch.testing.assert_close(layer.dequantize(), weight, rtol=1e-6, atol=1e-6)
    x = torch.randn(3, 2, 40).to(dtype)
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype
    expected = nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (y.float() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_and_config_round_trip(form):
    layer, _, _ = make(**form)
    twin = layer_from_config(layer.config(), dtype=torch.float32)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.dequantize(), layer.dequantize())
    x = torch.randn(2, 40)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.qweight.dtype == torch.int32
    assert layer.qweight.shape == (7, -(-40 * layer.bits // 32))
    assert (layer.perm is None) == (not form.get("permuted", False))


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded_with_a_model(form, tmp_path):
    pytest.importorskip("safetensors")
    layer, _, _ = make(**form)
    model = nn.Sequential(layer, nn.ReLU())
    pumice.save(model, tmp_path / "saved")
    skeleton = nn.Sequential(nn.Linear(40, 7, layer.bias is not None), nn.ReLU())
    loaded = pumice.load(tmp_path / "saved", skeleton)
    x = torch.randn(2, 40)
    assert torch.equal(loaded(x), model(x))
    assert loaded[0].config() == layer.config()


def test_casts_touch_the_bias_alone():
    layer, weight, _ = make(zeros="integer", permuted=True)
    for cast in (layer.to(torch.bfloat16), layer.half()):
        assert cast.scales.dtype == torch.float16
        assert cast.qweight.dtype == torch.int32
        assert cast.zeros.dtype == torch.uint8
        assert cast.perm.dtype == torch.int32
    assert layer.bias.dtype == torch.float16
    torch.testing.assert_close(layer.dequantize(), weight, rtol=1e-6, atol=1e-6)


def test_gradients_reach_the_input_and_the_bias():
    layer, weight, _ = make(permuted=True)
    x = torch.randn(3, 40, requires_grad=True)
    dy = torch.randn(3, 7)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0), rtol=1e-5, atol=1e-5)


def test_an_adapter_trains_around_it():
    torch.manual_seed(0)
    layer, _, _ = make()
    adapter = nn.Linear(40, 40, bias=False)
    x, target = torch.randn(64, 40), torch.randn(64, 7)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(adapter(x)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_groups_in_any_order_are_stored_sorted():
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(40, 5)
    g_idx = (torch.arange(40) // 16)[torch.randperm(40, generator=generator)]
    q = torch.randint(0, 16, (5, 40), generator=generator).to(torch.uint8)
    scales = torch.rand(5, 3, generator=generator).half()
    layer = Int4Linear.from_quantized(linear, q, scales, bits=4, group_size=16, g_idx=g_idx)
    expected = (q.float() - 8) * scales.float()[:, g_idx]
    torch.testing.assert_close(layer.dequantize(), expected, rtol=1e-6, atol=1e-6)
    in_order = torch.arange(40) // 16
    layer = Int4Linear.from_quantized(linear, q, scales, bits=4, group_size=16, g_idx=in_order)
    assert layer.perm is None


Q = torch.zeros(7, 40, dtype=torch.uint8)
S = torch.ones(7, 3).half()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": Q.int()}, TypeError, "q must be uint8, not int32"),
        ({"q": Q[:, :39]}, ValueError, r"q must have shape \[7, 40\], not \[7, 39\]"),
        ({"q": Q + 16}, ValueError, "q holds values beyond 15"),
        ({"scales": S[:, :2]}, ValueError, r"scales must have shape \[7, 3\]"),
        ({"scales": S.double()}, TypeError, "scales must be float32, float16 or bfloat16"),
        ({"scales": S * float("nan")}, ValueError, "scales hold NaN"),
        ({"zeros": S.float()}, TypeError, "zeros must be uint8 or float16, not float32"),
        ({"zeros": S[:1]}, ValueError, r"zeros must have shape \[7, 3\]"),
        ({"perm": torch.zeros(40, dtype=torch.int32)}, ValueError, "not a permutation of 0 … 39"),
        ({"perm": torch.arange(39)}, ValueError, r"perm must have shape \[40\]"),
        ({"g_idx": torch.zeros(40, dtype=torch.int64)}, ValueError, "every group 16 columns"),
        ({"g_idx": torch.arange(40), "perm": torch.arange(40)}, ValueError, "not both"),
        ({"bits": 5}, ValueError, "bits must be 2, 3, 4 or 8, not 5"),
        ({"group_size": 24}, ValueError, "multiple of 16, not 24"),
        ({"group_size": 0}, ValueError, "multiple of 16, not 0"),
    ],
)
def test_refusals_name_the_argument(arguments, error, message):
    given = {"q": Q, "scales": S, "bits": 4, "group_size": 16, **arguments}
    with pytest.raises(error, match=message):
        Int4Linear.from_quantized(nn.Linear(40, 7), **given)


def test_a_state_dict_of_another_dtype_is_refused():
    layer, _, _ = make()
    state = layer.state_dict()
    state["scales"] = state["scales"].float()
    with pytest.raises(TypeError, match=r"scales must be torch.float16, .* torch.float32"):
        layer.load_state_dict(state)


def test_rounding_keeps_what_the_linear_layer_had():
    linear = nn.Linear(64, 5).eval()
    linear.bias.requires_grad_(False)
    layer = round_linear(linear, 8, 32, True)
    assert not layer.training
    assert not layer.bias.requires_grad
    assert layer.bias is not linear.bias
    assert float((layer.dequantize() - linear.weight).norm() / linear.weight.norm()) < 0.01
