"""Grids: ranges, zero points, the search, and the edges of what fp16 scales can say."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pumice.quantize.grid import Grid, expand, scale_dtype_for


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 9),
    st.integers(1, 100),
    st.sampled_from([16, 32, 48, -1]),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([-12, -3, 0, 8]),
    st.integers(0, 1000),
)
def test_every_weight_is_at_most_half_a_step_off(n, k, size, bits, symmetric, mse, power, seed):
    """With the full range; the searched one may clip, but never has the larger total error."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * 2.0**power
    dtype = scale_dtype_for(weight, bits)
    full = Grid(bits, symmetric, False, dtype)
    scale, zero = full.fit_groups(weight, size)
    assert torch.equal(scale, scale.to(dtype).float())
    assert bool((scale > 0).all())
    assert bool(((zero >= 0) & (zero <= 2**bits - 1) & (zero == zero.round())).all())
    error = (full.round_trip(weight, size) - weight).abs()
    step = expand(scale, size, k)
    # The zero point is rounded too: half a step more at the ends of an asymmetric range.
    assert bool((error <= step * ((0.5 if symmetric else 1.0) + 2**bits * 1e-3)).all())
    if mse:
        searched = Grid(bits, symmetric, True, dtype)
        q_error = (searched.round_trip(weight, size) - weight).abs()
        total, before = (
            torch.cat(
                [
                    e[:, i : i + (k if size == -1 else size)].pow(2.4).sum(1)
                    for i in range(0, k, k if size == -1 else size)
                ]
            )
            for e in (q_error, error)
        )
        assert bool((total <= before * (1 + 1e-5) + 1e-30).all())


def test_search_equals_brute_force():
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        found = Grid(3, symmetric, True).round_trip(weight, 16)
        for row, result in zip(weight.double(), found.double(), strict=True):
            best = None
            for step in range(80):
                share = 1 - step / 100
                low, high = share * min(row.min(), 0), share * max(row.max(), 0)
                if symmetric:
                    high = share * row.abs().max()
                    low = -high
                scale = ((high - low) / 7).half().double()
                zero = 4 if symmetric else torch.round(-low / scale)
                rounded = (torch.clamp(torch.round(row / scale) + zero, 0, 7) - zero) * scale
                error = (rounded - row).abs().pow(2.4).sum()
                if best is None or error < best[0] * (1 - 1e-6):
                    best = error, rounded
            torch.testing.assert_close(result, best[1], rtol=1e-5, atol=1e-6)


def test_groups_of_zeros_stay_zero():
    weight = torch.zeros(2, 32)
    weight[1, 16:] = 1.0
    for symmetric in (True, False):
        for mse in (True, False):
            result = Grid(4, symmetric, mse).round_trip(weight, 16)
            assert torch.equal(result[0], weight[0])
            assert torch.equal(result[1, :16], weight[1, :16])
            assert bool(result.isfinite().all())


def test_values_on_the_grid_come_back_exactly():
    q = torch.arange(16.0).repeat(2, 1)
    scale = torch.tensor([[0.5], [0.25]])
    asymmetric = (q - 3) * scale
    assert torch.equal(Grid(4, symmetric=False).round_trip(asymmetric, 16), asymmetric)


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [
        (0.0, torch.float16),
        (1.0, torch.float16),
        (2.0**-10, torch.float16),
        (2.0**-11, torch.float32),
        (1e9, torch.float32),
    ],
)
def test_scales_are_fp16_where_it_reaches(largest, dtype):
    weight = torch.full((1, 16), largest)
    assert scale_dtype_for(weight, 4) == dtype
    result = Grid(4, True, False, dtype).round_trip(weight, 16)
    torch.testing.assert_close(result, weight, rtol=0.1, atol=0.0)
