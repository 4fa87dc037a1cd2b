"""AWQ's tensors in GEMM order, laid out by hand, against ours: exact both ways."""

import pytest
import torch
from format_layouts import assert_same_tensors, awq_layer, gptq_layer, make_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pumice.integrations.formats import awq, gptq


def read(tensors, weight) -> awq.PackedWeight:
    return awq.read(tensors, k=weight.shape[1], group_size=weight.group_size, layer="layer")


@pytest.mark.parametrize("n", [8, 16, 40])
@pytest.mark.parametrize(
    ("k", "group_size"), [(16, 16), (32, 16), (48, 48), (64, 32), (33, -1), (1, -1)]
)
def test_every_small_shape(n, k, group_size):
    weight = make_weight(n, k, 4, group_size, lowest_zero=0, seed=n + k)
    tensors = awq_layer(weight)
    packed = read(tensors, weight)
    assert torch.equal(packed.unpack().long(), weight.q)
    assert torch.equal(packed.full_zeros().long(), weight.zeros)
    torch.testing.assert_close(packed.dequantize(), weight.dense(), rtol=0, atol=0)
    assert_same_tensors(awq.write(packed), tensors)
    layer = packed.to_layer(nn.Linear(k, n))
    torch.testing.assert_close(layer.dequantize(), weight.dense(), rtol=0, atol=0)
    assert_same_tensors(awq.write(awq.PackedWeight.from_layer(layer)), tensors)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 6),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([16, 32, 48]),
    symmetric=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_shape(n, groups, group_size, symmetric, seed):
    weight = make_weight(
        8 * n, groups * group_size, 4, group_size, symmetric=symmetric, lowest_zero=0, seed=seed
    )
    tensors = awq_layer(weight)
    packed = read(tensors, weight)
    assert (packed.zeros is None) == bool((weight.zeros == 8).all())
    assert torch.equal(packed.unpack().long(), weight.q)
    assert_same_tensors(awq.write(packed), tensors)


def test_the_order_of_one_word():
    """Column i has the value i: the word shows where each went."""
    weight = make_weight(8, 16)
    weight.q[:] = torch.arange(8)[:, None]
    tensors = awq_layer(weight)
    assert tensors["qweight"].tolist() == [[0x75316420]] * 16
    assert_same_tensors(awq.write(read(tensors, weight)), tensors)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (make_weight(8, 32, bits=3), r"it has 3 bits, and AWQ has 4"),
        (make_weight(9, 32), r"it has 9 outputs, and AWQ needs a multiple of 8"),
        (make_weight(8, 40), r"groups of 16 do not divide its 40 inputs"),
        (make_weight(8, 32, act_order=True), r"activation order, for which AWQ has no place"),
    ],
)
def test_what_the_format_cannot_hold(weight, message):
    packed = gptq.read(
        gptq_layer(weight), k=weight.shape[1], bits=weight.bits, group_size=weight.group_size
    )
    with pytest.raises(ValueError, match=message):
        awq.write(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("qzeros"), r"'layer\.qzeros' is missing"),
        (lambda t: t.update(qweight=t["qweight"].T), r"'layer\.qweight' must have shape \[32, 32"),
        (lambda t: t.update(scales=t["scales"][:, 1:]), r"'layer\.scales' must have shape \[2, 8"),
        (lambda t: t["scales"].fill_(float("inf")), r"'layer\.scales' holds NaN or infinite"),
        (lambda t: t.update(g_idx=t["qweight"]), r"'layer\.g_idx' is not part of the format"),
        (lambda t: t.update(qzeros=t["qzeros"].to("meta")), r"'layer' are on different devices"),
    ],
)
def test_malformed_tensors_are_refused(change, message):
    weight = make_weight(8, 32)
    tensors = awq_layer(weight)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        read(tensors, weight)
