"""compressed-tensors' tensors, laid out by hand, against ours: exact both ways."""

import pytest
import torch
from format_layouts import assert_same_tensors, make_weight, packed_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pumice.integrations.formats import compressed_tensors as ct
from pumice.nn import Int8Linear


def read(tensors, weight, *, symmetric: bool = False) -> ct.PackedWeight:
    n, k = weight.shape
    return ct.read_packed(
        tensors,
        n=n,
        k=k,
        bits=weight.bits,
        group_size=weight.group_size,
        symmetric=symmetric,
        layer="layer",
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 5, 8, 11])
@pytest.mark.parametrize(("k", "group_size"), [(16, 16), (32, 16), (96, 32), (33, -1), (1, -1)])
def test_every_small_shape(n, k, group_size, bits, symmetric):
    weight = make_weight(n, k, bits, group_size, symmetric=symmetric, lowest_zero=0, seed=n + k)
    tensors = packed_layer(weight, symmetric=symmetric)
    packed = read(tensors, weight, symmetric=symmetric)
    assert torch.equal(packed.qweight, tensors["weight_packed"])
    assert torch.equal(packed.unpack().long(), weight.q)
    assert torch.equal(packed.full_zeros().long(), weight.zeros)
    torch.testing.assert_close(packed.dequantize(), weight.dense(), rtol=0, atol=0)
    if symmetric or packed.zeros is not None:  # zero points that happen to be all the middle
        assert_same_tensors(ct.write_packed(packed), tensors)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    groups=st.integers(1, 4),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([16, 32, 48]),
    act_order=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_shape(n, groups, bits, group_size, act_order, seed):
    k = groups * group_size
    weight = make_weight(n, k, bits, group_size, act_order=act_order, lowest_zero=0, seed=seed)
    weight.zeros[0, 0] = 1 if bits > 2 else 3  # not the middle everywhere
    tensors = packed_layer(weight, symmetric=False)
    packed = read({**tensors, "weight_g_idx": weight.g_idx}, weight)
    assert torch.equal(packed.unpack().long(), weight.q)
    assert torch.equal(packed.full_zeros().long(), weight.zeros)
    assert torch.equal(packed.full_g_idx(), weight.g_idx)
    if packed.g_idx is not None:
        tensors["weight_g_idx"] = weight.g_idx
    assert_same_tensors(ct.write_packed(packed), tensors)
    layer = packed.to_layer(nn.Linear(k, n, bias=False))
    torch.testing.assert_close(layer.dequantize(), packed.dequantize(), rtol=0, atol=0)
    assert_same_tensors(ct.write_packed(ct.PackedWeight.from_layer(layer)), tensors)


def test_zero_points_of_older_files_are_signed_and_not_packed():
    weight = make_weight(5, 32)
    tensors = packed_layer(weight, symmetric=False)
    tensors["weight_zero_point"] = (weight.zeros - 8).to(torch.int8)
    assert torch.equal(read(tensors, weight).full_zeros().long(), weight.zeros)
    tensors["weight_zero_point"][2, 1] = 8
    with pytest.raises(ValueError, match=r"'layer\.weight_zero_point' holds.*4 bits, \[-8, 7\]"):
        read(tensors, weight)


def test_a_g_idx_of_minus_ones_is_unused():
    weight = make_weight(5, 32, symmetric=True)
    tensors = packed_layer(weight, symmetric=True)
    tensors["weight_g_idx"] = torch.full((32,), -1, dtype=torch.int32)
    assert read(tensors, weight, symmetric=True).g_idx is None


def test_one_scale_for_the_whole_tensor():
    weight = make_weight(5, 32, group_size=-1, symmetric=True)
    weight.scales[:] = 0.25
    tensors = packed_layer(weight, symmetric=True)
    tensors["weight_scale"] = torch.tensor([0.25])
    packed = read(tensors, weight, symmetric=True)
    torch.testing.assert_close(packed.dequantize(), weight.dense(), rtol=0, atol=0)


def test_groups_that_do_not_divide_are_not_written():
    weight = make_weight(5, 40, symmetric=True)
    packed = read(packed_layer(weight, symmetric=True), weight, symmetric=True)
    torch.testing.assert_close(packed.dequantize(), weight.dense(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"groups of 16 do not divide its 40 inputs"):
        ct.write_packed(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight_packed"), r"'layer\.weight_packed' is missing"),
        (lambda t: t.pop("weight_zero_point"), r"'layer\.weight_zero_point' is missing"),
        (
            lambda t: t.update(weight_packed=t["weight_packed"][:, 1:]),
            r"'layer\.weight_packed' must have shape \[8, 4\]",
        ),
        (
            lambda t: t.update(weight_zero_point=t["weight_zero_point"].T),
            r"'layer\.weight_zero_point' must have shape \[1, 2\]",
        ),
        (
            lambda t: t.update(weight_shape=torch.tensor([8, 31])),
            r"'layer\.weight_shape' is \[8, 31\], but the layer is \[8, 32\]",
        ),
        (lambda t: t["weight_scale"].fill_(float("inf")), r"'layer\.weight_scale' holds NaN or"),
        (
            lambda t: t.update(weight_g_idx=torch.arange(32).int()),
            r"'layer\.weight_g_idx' names group 31, but there are 2",
        ),
        (
            lambda t: t.update(weight_global_scale=torch.ones(1)),
            r"'layer\.weight_global_scale' is not part of the format",
        ),
        (lambda t: t.update(weight_scale=t["weight_scale"].to("meta")), r"different devices"),
    ],
)
def test_malformed_tensors_are_refused(change, message):
    weight = make_weight(8, 32)
    tensors = packed_layer(weight, symmetric=False)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        read(tensors, weight)


# ---- int-quantized


def int8_tensors(n: int = 6, k: int = 20) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.randint(-128, 128, (n, k), dtype=torch.int8),
        "weight_scale": torch.rand(n, 1).bfloat16() + 0.01,
    }


def read_int8(tensors, *, dynamic: bool = True, per_token: bool = True) -> Int8Linear:
    linear = nn.Linear(20, 6)
    return ct.read_int8(tensors, linear, dynamic=dynamic, per_token=per_token, layer="layer")


def test_int8_weights_with_dynamic_activations():
    tensors = int8_tensors()
    layer = read_int8(tensors)
    assert layer.activations == "per_token"
    expected = tensors["weight"].float() * tensors["weight_scale"].float()
    torch.testing.assert_close(layer.dequantize(), expected, rtol=0, atol=0)
    tensors["weight_scale"] = tensors["weight_scale"].float()
    assert_same_tensors(ct.write_int8(layer), tensors)


def test_int8_weights_with_a_static_activation_scale():
    tensors = {**int8_tensors(), "input_scale": torch.tensor([0.125])}
    layer = read_int8(tensors, dynamic=False, per_token=False)
    assert layer.static_activations
    assert layer.activation_scale.tolist() == [0.125]
    x = torch.tensor([[0.125 * 3] * 20])
    expected = (3 * 0.125 * layer.dequantize()).sum(1) + layer.bias
    torch.testing.assert_close(layer(x)[0], expected)
    tensors["weight_scale"] = tensors["weight_scale"].float()
    assert_same_tensors(ct.write_int8(layer), tensors)


def test_int8_weights_with_one_scale():
    tensors = {**int8_tensors(), "weight_scale": torch.tensor([0.5])}
    layer = read_int8(tensors)
    assert layer.weights == "per_tensor"
    assert torch.equal(layer.dequantize(), tensors["weight"] * 0.5)
    assert_same_tensors(ct.write_int8(layer), tensors)


@pytest.mark.parametrize("zero", [None, 3])
def test_int8_weights_alone_are_a_packed_weight_of_8_bits(zero):
    tensors = int8_tensors()
    expected = tensors["weight"].float()
    if zero is not None:
        tensors["weight_zero_point"] = torch.full((6, 1), zero, dtype=torch.int8)
        expected = expected - zero
    packed = ct.int8_as_packed(tensors, n=6, k=20, group_size=-1, layer="layer")
    expected = expected * tensors["weight_scale"].float()
    torch.testing.assert_close(packed.dequantize(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(6, 20)}, r"'layer\.weight' must be int8, not float32"),
        ({"weight": torch.zeros(6, 19, dtype=torch.int8)}, r"'layer\.weight' must have shape"),
        ({"weight_scale": torch.ones(5, 1)}, r"'layer\.weight_scale' must have shape \[6, 1\]"),
        ({"weight_zero_point": torch.ones(6, 1)}, r"'layer\.weight_zero_point' is not zero"),
        ({"input_scale": torch.tensor([0.0])}, r"'layer\.input_scale' must be positive"),
        ({"input_scale": torch.ones(2)}, r"'layer\.input_scale' must hold one"),
        ({"input_zero_point": torch.tensor([7])}, r"'layer\.input_zero_point' is not zero"),
    ],
)
def test_malformed_int8_tensors_are_refused(change, message):
    tensors = {**int8_tensors(), "input_scale": torch.ones(1), **change}
    with pytest.raises(ValueError, match=message):
        read_int8(tensors, dynamic=False, per_token=False)


def test_smoothed_layers_are_not_written():
    layer = Int8Linear.from_linear(nn.Linear(20, 6), smooth=torch.ones(20))
    with pytest.raises(ValueError, match="smoothing vector, for which"):
        ct.write_int8(layer)
