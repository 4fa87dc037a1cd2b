"""GPTQ's tensors, laid out by hand, against ours: exact both ways."""

import pytest
import torch
from format_layouts import assert_same_tensors, gptq_layer, int32, make_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pumice.integrations.formats import gptq


def read(tensors, weight, *, symmetric: bool = False, version: int = 1) -> gptq.PackedWeight:
    return gptq.read(
        tensors,
        k=weight.shape[1],
        bits=weight.bits,
        group_size=weight.group_size,
        symmetric=symmetric,
        version=version,
        layer="layer",
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 5, 8, 11])
@pytest.mark.parametrize(
    ("k", "group_size"), [(16, 16), (32, 16), (40, 16), (96, 32), (33, -1), (16, 128)]
)
def test_every_small_shape(n, k, group_size, bits, act_order, version):
    weight = make_weight(n, k, bits, group_size, act_order=act_order, seed=n + k)
    tensors = gptq_layer(weight, version)
    packed = read(tensors, weight, version=version)
    assert torch.equal(packed.unpack().long(), weight.q)
    assert torch.equal(packed.full_zeros().long(), weight.zeros)
    assert torch.equal(packed.full_g_idx(), weight.g_idx)
    torch.testing.assert_close(packed.dequantize(), weight.dense(), rtol=0, atol=0)
    assert_same_tensors(gptq.write(packed, version=version), tensors)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_through_a_layer_and_back(bits, act_order):
    weight = make_weight(6, 80, bits, 32, act_order=act_order)
    tensors = gptq_layer(weight)
    layer = read(tensors, weight).to_layer(nn.Linear(80, 6, bias=False))
    assert layer.permuted == act_order
    torch.testing.assert_close(layer.dequantize(), weight.dense(), rtol=0, atol=0)
    x = torch.linspace(-2, 2, 3 * 80).reshape(3, 80)
    torch.testing.assert_close(layer(x), x @ weight.dense().T, rtol=1e-4, atol=1e-4)
    assert_same_tensors(gptq.write(gptq.PackedWeight.from_layer(layer), version=1), tensors)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 70),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 16, 32, 48]),
    act_order=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_shape(n, k, bits, group_size, act_order, seed):
    weight = make_weight(n, k, bits, group_size, act_order=act_order, seed=seed)
    for version in (1, 2):
        tensors = gptq_layer(weight, version)
        packed = read(tensors, weight, version=version)
        assert torch.equal(packed.unpack().long(), weight.q)
        assert_same_tensors(gptq.write(packed, version=version), tensors)
        layer = packed.to_layer(nn.Linear(k, n, bias=False, device="meta"))
        again = gptq.PackedWeight.from_layer(layer)
        assert_same_tensors(gptq.write(again, version=version), tensors)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("declared", [1, 2])
@pytest.mark.parametrize("actual", [1, 2])
def test_symmetric_values_tell_the_version(bits, declared, actual):
    """Metadata can lie: writers are known to mark version 2 as version 1."""
    weight = make_weight(8, 32, bits, symmetric=True)
    packed = read(gptq_layer(weight, actual), weight, symmetric=True, version=declared)
    assert packed.zeros is None
    torch.testing.assert_close(packed.dequantize(), weight.dense(), rtol=0, atol=0)


def test_the_words_of_a_symmetric_layer():
    weight = make_weight(8, 16, symmetric=True)
    packed = read(gptq_layer(weight, 2), weight, version=2)
    assert gptq.write(packed, version=1)["qzeros"].tolist() == [[0x77777777]]
    assert gptq.write(packed, version=2)["qzeros"].tolist() == [[0x88888888 - 2**32]]


def test_a_declared_symmetry_that_the_values_deny():
    """Then the declared version counts."""
    weight = make_weight(8, 32)
    for version in (1, 2):
        packed = read(gptq_layer(weight, version), weight, symmetric=True, version=version)
        assert torch.equal(packed.full_zeros().long(), weight.zeros)


def test_zeros_of_version_1_beyond_the_bits():
    weight = make_weight(8, 32)
    weight.zeros[:] = 5
    tensors = gptq_layer(weight)
    tensors["qzeros"] = int32([[0x44444444], [0x444444F4]])
    with pytest.raises(ValueError, match=r"'layer\.qzeros' stores 15.*zero point of 16.*gptq_v2"):
        read(tensors, weight)


def test_version_1_cannot_hold_a_zero_point_of_0():
    weight = make_weight(8, 32)
    weight.zeros[3, 1] = 0
    packed = read(gptq_layer(weight, 2), weight, version=2)
    with pytest.raises(ValueError, match=r"zero points of 0.*gptq_v2"):
        gptq.write(packed, version=1)


def test_bits_beyond_the_last_value_are_ignored():
    weight = make_weight(3, 33, group_size=-1)
    tensors = gptq_layer(weight)
    tensors["qweight"][-1] |= 0x7FFFFFF0
    stored = {name: tensor.clone() for name, tensor in tensors.items()}
    packed = read(tensors, weight)
    assert torch.equal(packed.unpack().long(), weight.q)
    assert (packed.qweight[:, -1] >= 0).all()
    assert (packed.qweight[:, -1] < 16).all()
    assert_same_tensors(tensors, stored)  # the caller's are left alone


def test_a_missing_g_idx_means_neighbours():
    weight = make_weight(4, 40)
    tensors = gptq_layer(weight)
    del tensors["g_idx"]
    torch.testing.assert_close(read(tensors, weight).dequantize(), weight.dense(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("qweight"), r"'layer\.qweight' is missing"),
        (lambda t: t.pop("scales"), r"'layer\.scales' is missing"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), r"'layer\.qweight' must have shape \[4, 8"),
        (lambda t: t.update(qweight=t["qweight"].long()), r"'layer\.qweight' must be int32, not"),
        (lambda t: t.update(qzeros=t["qzeros"][:1]), r"'layer\.qzeros' must have shape \[2, 1\]"),
        (lambda t: t.update(scales=t["scales"].double()), r"'layer\.scales' must be float32 or"),
        (lambda t: t["scales"].fill_(float("nan")), r"'layer\.scales' holds NaN or infinite"),
        (lambda t: t["g_idx"].fill_(2), r"'layer\.g_idx' names group 2, but there are 2 groups"),
        (lambda t: t["g_idx"].fill_(-1), r"'layer\.g_idx' names group -1"),
        (lambda t: t.update(g_idx=t["g_idx"][1:]), r"'layer\.g_idx' must have shape \[32\]"),
        (lambda t: t.update(perm=t["g_idx"]), r"'layer\.perm' is not part of the format"),
        (
            lambda t: t.update(scales=t["scales"].to("meta")),
            r"'layer' are on different devices: .*qweight on cpu, qzeros on cpu, scales on meta",
        ),
    ],
)
def test_malformed_tensors_are_refused(change, message):
    weight = make_weight(8, 32)
    tensors = gptq_layer(weight)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        read(tensors, weight)


def test_groups_of_unequal_sizes():
    weight = make_weight(8, 32)
    weight.g_idx[:20], weight.g_idx[20:] = 1, 0
    packed = read(gptq_layer(weight), weight)
    torch.testing.assert_close(packed.dequantize(), weight.dense(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"every group 16 columns.*\[12, 20\]"):
        packed.to_layer(nn.Linear(32, 8))
