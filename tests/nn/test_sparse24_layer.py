"""Sparse24Linear: what it stores, what it computes, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

import pumice
from pumice.nn import Sparse24Linear, layer_from_config
from sparse24_cases import prune

K, N = 40, 7


def pruned_linear(dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(K, N, bias).to(dtype)
    with torch.no_grad():
        weight = torch.randn(N, K, generator=generator) * 0.2
        linear.weight.copy_(prune(weight.to(dtype), generator, 0.9))
    return linear


def quantized(bits=4, group_size=32, zeros="none", bias=True, crowd=None, seed=0):
    """A layer of random codes and the weight it stands for."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(K, N, bias)
    size = K if group_size == -1 else group_size
    groups = -(-K // size)
    q = torch.randint(0, 2**bits, (N, K), generator=generator).to(torch.uint8)
    scales = torch.rand(N, groups, generator=generator).add(0.1).half()
    z = {
        "none": None,
        "integer": torch.randint(0, 2**bits, (N, groups), generator=generator).to(torch.uint8),
        "float": (torch.rand(N, groups, generator=generator) * 8).half(),
    }[zeros]
    crowd = (1.0 if zeros == "float" else 0.8) if crowd is None else crowd
    mask = prune(torch.ones(N, K), generator, crowd) != 0
    layer = Sparse24Linear.from_quantized(
        linear, q, scales, z, mask, bits=bits, group_size=group_size
    )
    group = torch.arange(K) // size
    zero = 2.0 ** (bits - 1) if z is None else z.float()[:, group]
    weight = torch.where(mask, (q.float() - zero) * scales.float()[:, group], 0.0)
    return layer, weight, linear.bias


def make(form):
    """Any layer, the weight it stands for, its bias."""
    form = dict(form)
    if form.pop("weights", "int4") == "int4":
        return quantized(**form)
    linear = pruned_linear(**{k: v for k, v in form.items() if k != "int8"})
    if not form.get("int8"):
        return Sparse24Linear.from_linear(linear), linear.weight.detach().float(), linear.bias
    layer = Sparse24Linear.from_linear(linear, weights="int8")
    q, scale, _ = pumice.ops.int8_quantize(linear.weight.detach())
    return layer, q * scale[:, None], linear.bias


FORMS = [
    {"weights": "float"},
    {"weights": "float", "dtype": torch.bfloat16, "bias": False},
    {"weights": "int8", "int8": True},
    {},
    {"bits": 3, "zeros": "integer"},
    {"bits": 4, "zeros": "integer", "group_size": -1, "bias": False},
    {"bits": 8, "zeros": "float", "group_size": 64},
    {"bits": 2},
]


@pytest.mark.parametrize("form", FORMS)
def test_computes_with_the_weight_it_stands_for(form):
    layer, weight, bias = make(form)
    torch.testing.assert_close(layer.dequantize(), weight, rtol=1e-6, atol=1e-6)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    if layer.weights == "float":
        dtypes = (layer.values.dtype,)
    for dtype in dtypes:
        x = torch.randn(3, 2, K).to(dtype)
        with torch.no_grad():
            y = layer(x)
        assert y.dtype == dtype
        expected = nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        if layer.weights == "int8":  # activations of 8 bits
            tolerance += 2e-2
        assert (y.float() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_and_config_round_trip(form):
    layer, _, _ = make(form)
    twin = layer_from_config(layer.config(), dtype=torch.float32)
    assert all(torch.isfinite(t).all() for t in twin.state_dict().values())
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.dequantize(), layer.dequantize())
    x = torch.randn(2, K).to(layer.values.dtype if layer.weights == "float" else torch.float32)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    stored = {"float": {"values"}, "int8": {"values", "weight_scale"}}.get(
        layer.weights, {"qvalues", "scales"} | ({"zeros"} if layer.zeros_kind != "none" else set())
    )
    assert set(layer.state_dict()) - {"bias"} == stored | {"metadata"}


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded_with_a_model(form, tmp_path):
    pytest.importorskip("safetensors")
    layer, _, _ = make(form)
    model = nn.Sequential(layer, nn.ReLU())
    pumice.save(model, tmp_path / "saved")
    skeleton = nn.Sequential(nn.Linear(K, N, layer.bias is not None), nn.ReLU())
    loaded = pumice.load(tmp_path / "saved", skeleton)
    x = torch.randn(2, K).to(layer.values.dtype if layer.weights == "float" else torch.float32)
    assert torch.equal(loaded(x), model(x))
    assert loaded[0].config() == layer.config()


def test_bytes_are_what_is_said():
    linear = nn.Linear(1024, 256, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        linear.weight.view(256, -1, 4)[..., ::2] = 0

    def bytes_of(layer):
        return sum(b.numel() * b.element_size() for b in layer.buffers())

    dense = 256 * 1024 * 2
    assert bytes_of(Sparse24Linear.from_linear(linear)) == dense // 2 + dense // 16
    int8 = Sparse24Linear.from_linear(linear, weights="int8")
    assert bytes_of(int8) == dense // 4 + dense // 16 + 256 * 4


def test_casts_move_the_values_of_a_float_layer_alone():
    layer = Sparse24Linear.from_linear(pruned_linear()).to(torch.bfloat16)
    assert layer.values.dtype == torch.bfloat16
    assert layer.metadata.dtype == torch.uint8
    assert layer.config()["value_dtype"] == "bfloat16"
    assert "value_dtype='bfloat16'" in repr(layer)
    assert layer(torch.ones(1, K, dtype=torch.bfloat16)).dtype == torch.bfloat16
    packed, weight, _ = quantized(zeros="integer")
    packed.to(torch.bfloat16)
    assert packed.scales.dtype == torch.float16
    assert packed.zeros.dtype == torch.uint8
    assert packed.bias.dtype == torch.bfloat16
    torch.testing.assert_close(packed.dequantize(), weight, rtol=1e-6, atol=1e-6)
    int8 = Sparse24Linear.from_linear(pruned_linear(), weights="int8").half()
    assert int8.weight_scale.dtype == torch.float32


def test_weight_is_what_is_stored():
    assert Sparse24Linear.from_linear(pruned_linear(torch.float16)).weight.dtype == torch.float16
    assert quantized()[0].weight.dtype == torch.int32


@pytest.mark.parametrize("form", [FORMS[0], FORMS[4]])
def test_gradients_reach_the_input_and_the_bias(form):
    layer, weight, _ = make(form)
    x = torch.randn(3, K, requires_grad=True)
    dy = torch.randn(3, N)
    layer(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0), rtol=1e-5, atol=1e-5)


def test_leaves_the_linear_as_it_is_and_takes_its_mode():
    linear = pruned_linear().eval()
    before = copy.deepcopy(linear.state_dict())
    layer = Sparse24Linear.from_linear(linear)
    assert not layer.training
    assert layer.bias is not linear.bias
    for name, tensor in linear.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2], FORMS[3]])
def test_exports_as_the_whole_model(form):
    layer, _, _ = make(form)
    x = torch.randn(3, K)
    exported = torch.export.export(layer.eval(), (x,))
    assert torch.equal(exported.module()(x), layer(x))


REFUSED = [
    (ValueError, "in_features must be a multiple of 4, .* not 38", {"in_features": 38}),
    (ValueError, "weights must be one of .*, not 'int5'", {"weights": "int5"}),
    (ValueError, "value_dtype must be one of .*, not 'float64'", {"value_dtype": "float64"}),
    (ValueError, "bits must be 2, 3, 4 or 8, not 5", {"bits": 5}),
    (ValueError, "group_size must be -1 or a multiple of 32, not 16", {"group_size": 16}),
    (TypeError, "group_size must be an integer", {"group_size": 32.0}),
    (ValueError, "zeros_kind must be one of", {"zeros_kind": "some"}),
    (ValueError, "scale_dtype must be one of", {"scale_dtype": "int8"}),
]


@pytest.mark.parametrize(("error", "message", "options"), REFUSED)
def test_refused_options(error, message, options):
    with pytest.raises(error, match=f"Sparse24Linear: {message}"):
        Sparse24Linear(**{"in_features": K, "out_features": N, **options})


def test_refused_weights():
    linear = nn.Linear(K, N)
    with torch.no_grad():
        linear.weight[:] = 0
        linear.weight[3, 8:11] = 1
    with pytest.raises(ValueError, match=r"not 2:4: row 3, group 2 \(columns 8 to 11\)"):
        Sparse24Linear.from_linear(linear)
    with pytest.raises(ValueError, match=r"not 2:4: row 3, group 2 \(columns 8 to 11\)"):
        Sparse24Linear.from_linear(linear, weights="int8")
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, not ReLU"):
        Sparse24Linear.from_linear(nn.ReLU())
    with pytest.raises(ValueError, match="in_features must be a multiple of 4"):
        Sparse24Linear.from_linear(nn.Linear(6, 2))
    with pytest.raises(ValueError, match="weights of 'float' or 'int8', not 'int4'"):
        Sparse24Linear.from_linear(pruned_linear(), weights="int4")
    broken = pruned_linear()
    with torch.no_grad():
        broken.weight[2] *= float("nan")
        broken.weight.view(N, -1, 4)[2, :, 2:] = 0
    with pytest.raises(ValueError, match="NaN or infinite values \\(rows 2\\)"):
        Sparse24Linear.from_linear(broken, weights="int8")


def test_refused_codes():
    linear = nn.Linear(K, N)
    q = torch.zeros(N, K, dtype=torch.uint8)
    scales, mask = torch.ones(N, 2).half(), prune(torch.ones(N, K), torch.Generator()) != 0
    good = {"q": q, "scales": scales, "zeros": None, "mask": mask, "group_size": 32}
    Sparse24Linear.from_quantized(linear, **good)
    fewer = mask.clone()
    fewer[4, 12:16] = False
    more = mask.clone()
    more[5, 16:20] = True
    for error, message, changes in (
        (TypeError, "q must be uint8, not int8", {"q": q.to(torch.int8)}),
        (TypeError, "mask must be bool", {"mask": mask.float()}),
        (ValueError, r"mask must have shape \[7, 40\]", {"mask": mask[:, :36]}),
        (ValueError, r"scales must have shape \[7, 2\]", {"scales": scales[:, :1]}),
        (ValueError, "scales hold NaN", {"scales": scales * float("nan")}),
        (ValueError, "q holds values beyond 15", {"q": q + 16}),
        (ValueError, "zeros hold 16, but 15 is the largest",
         {"zeros": torch.full((N, 2), 16, dtype=torch.uint8)}),
        (ValueError, r"mask, row 5, group 4 \(columns 16 to 19\) keeps 4 weights; at most two",
         {"mask": more}),
        (ValueError, r"mask, row 4, group 3 \(columns 12 to 15\) keeps 0 weights; with floating",
         {"mask": fewer, "zeros": scales}),
    ):  # fmt: skip
        with pytest.raises(error, match=f"Sparse24Linear: {message}"):
            Sparse24Linear.from_quantized(linear, **{**good, **changes})


def test_refused_state_dicts():
    layer, _, _ = quantized(zeros="integer")
    state = layer.state_dict()
    wrong = state["metadata"].clone()
    wrong[2, 3] = 0x41  # group 6: the places 1 and 0
    with pytest.raises(
        ValueError, match=r"metadata, row 2, group 6 \(columns 24 to 27\).*\[1, 0\]"
    ):
        layer.load_state_dict({**state, "metadata": wrong})
    with pytest.raises(ValueError, match="zeros hold 200"):
        layer.load_state_dict({**state, "zeros": torch.full_like(state["zeros"], 200)})
    with pytest.raises(TypeError, match=r"qvalues must be torch\.int32, but the state dict"):
        layer.load_state_dict({**state, "qvalues": state["qvalues"].float()})


def test_replaces_modules_of_a_model():
    model = nn.Sequential(pruned_linear(), nn.ReLU(), nn.Linear(N, 8))
    x = torch.randn(2, K)
    expected = model(x)
    replaced = pumice.nn._replace.replace_modules(
        model, {"0": Sparse24Linear.from_linear(model.get_submodule("0"))}
    )
    torch.testing.assert_close(replaced(x), expected)
