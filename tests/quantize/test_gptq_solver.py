"""The GPTQ solver against a slow derivation, and what it promises for any input."""

import hypothesis.strategies as st
import obs_reference
import pytest
import torch
from hypothesis import given, settings

from pumice.quantize.gptq_solver import solve
from pumice.quantize.grid import Grid, expand
from pumice.quantize.obs import aligned_blocks, inverse_factor, quadratic_error, sweep

ORDERS = {
    "plain": {"act_order": False, "static_groups": False},
    "static": {"act_order": False, "static_groups": True},
    "act-order": {"act_order": True, "static_groups": False},
    "act-order, static": {"act_order": True, "static_groups": True},
}


def problem(n, k, tokens, seed=0):
    """A weight, and the Hessian of correlated inputs whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.rand(k, generator=generator).add(0.1)
    x = torch.randn(tokens, k, generator=generator) @ mix
    return torch.randn(n, k, generator=generator), 2 / tokens * x.T @ x


def dequantize(solution, group_size):
    k = solution.q.shape[1]
    scale, zero = (expand(t, group_size, k) for t in (solution.scale, solution.zero))
    stored = (solution.q.float() - zero) * scale
    if solution.perm is None:
        return stored
    weight = torch.empty_like(stored)
    weight[:, solution.perm] = stored
    return weight


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("how", ORDERS)
@pytest.mark.parametrize(
    ("bits", "k", "group_size", "block_size"),
    [(4, 64, 16, 32), (3, 72, 32, 16), (4, 50, -1, 7), (2, 40, 16, 128), (8, 48, 16, 48)],
)
def test_equals_the_slow_derivation(how, bits, k, group_size, block_size, symmetric):
    weight, hessian = problem(3, k, 3 * k, seed=bits)
    solution = solve(
        weight, hessian, Grid(bits, symmetric), group_size, block_size=block_size, **ORDERS[how]
    )
    by_energy = sorted(range(k), key=lambda i: -float(hessian[i, i]))
    q, expected = obs_reference.solve(
        weight,
        hessian,
        bits,
        k if group_size == -1 else group_size,
        symmetric,
        0.01,
        by_energy if ORDERS[how]["act_order"] else list(range(k)),
        ORDERS[how]["static_groups"],
    )
    in_order = solution.q
    if solution.perm is not None:
        in_order = torch.empty_like(solution.q)
        in_order[:, solution.perm] = solution.q
    assert torch.equal(in_order.double(), q.double())
    result = dequantize(solution, group_size)
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-4)
    error = quadratic_error(result - weight, hessian)
    expected_error = quadratic_error(expected - weight.double(), hessian.double())
    torch.testing.assert_close(error.double(), expected_error, rtol=1e-3, atol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 20),
    st.integers(1, 100),
    st.integers(1, 150),
    st.sampled_from([16, 32, 64, -1]),
    st.sampled_from([2, 3, 4]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(ORDERS)),
    st.integers(0, 1000),
)
def test_never_worse_than_rounding_to_nearest(n, k, tokens, size, bits, symmetric, mse, how, seed):
    """In the norm of H, row by row, on the same groups; few tokens make H singular."""
    weight, hessian = problem(n, k, tokens, seed)
    grid = Grid(bits, symmetric, mse)
    solution = solve(weight, hessian, grid, size, **ORDERS[how])
    assert int(solution.q.max()) < 2**bits
    error = quadratic_error(dequantize(solution, size) - weight, hessian)
    perm = torch.arange(k) if solution.perm is None else solution.perm
    nearest = grid.round_trip(weight[:, perm], size) - weight[:, perm]
    nearest_error = quadratic_error(nearest, hessian[perm][:, perm])
    assert bool((error <= nearest_error * (1 + 1e-4) + 1e-5).all())


def test_much_better_than_rounding_to_nearest_on_correlated_inputs():
    weight, hessian = problem(32, 128, 1024)
    nearest = quadratic_error(Grid(4).round_trip(weight, 64) - weight, hessian).sum()
    for how in ORDERS.values():
        solution = solve(weight, hessian, Grid(4), 64, **how)
        error = quadratic_error(dequantize(solution, 64) - weight, hessian).sum()
        assert error < 0.6 * nearest
        assert solution.rounded_rows == 0


@pytest.mark.parametrize("how", ORDERS)
@pytest.mark.parametrize("group_size", [16, 48, 128, -1])
def test_the_size_of_lazy_batches_does_not_matter(how, group_size):
    weight, hessian = problem(8, 160, 400)
    results = [
        dequantize(
            solve(weight, hessian, Grid(3), group_size, block_size=b, **ORDERS[how]), group_size
        )
        for b in (1, 16, 100, 1000)
    ]
    for other in results[1:]:
        assert float((other != results[0]).float().mean()) < 0.02  # a rounding here and there


def test_blocks_cover_the_columns_and_hold_whole_groups_or_parts_of_one():
    for k in (1, 16, 100, 129, 576):
        for size in (16, 48, 64, 128, 200, k):
            blocks = aligned_blocks(k, size, 128)
            assert [j for a, b in blocks for j in range(a, b)] == list(range(k))
            assert all(b - a <= 128 for a, b in blocks)
            starts = {a for a, _ in blocks}
            for group in range(0, k, size):
                inside = any(a <= group and min(group + size, k) <= b for a, b in blocks)
                assert inside or group in starts


def test_the_factor_is_that_of_the_inverse():
    _, h = problem(1, 40, 100)
    factor = inverse_factor(h, 0.01, "the layer").double()
    assert torch.equal(factor, factor.triu())
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-4, atol=1e-6)


def test_dead_columns_are_rounded_to_nearest_and_harm_nobody():
    weight, hessian = problem(8, 64, 200)
    dead = [3, 17, 18, 63]
    hessian[dead] = 0.0
    hessian[:, dead] = 0.0
    for how in ORDERS.values():
        result = dequantize(solve(weight, hessian, Grid(4), 64, **how), 64)
        step = weight.abs().amax(1) * 2 / 15
        assert bool(((result - weight)[:, dead].abs() <= 0.51 * step[:, None] * 1.3).all())
        assert bool(result.isfinite().all())


def test_damping_rises_until_a_singular_hessian_has_a_factor():
    weight, _ = problem(4, 32, 1)
    x = torch.randn(1, 32)
    hessian = 2 * x.T @ x  # rank one
    result = dequantize(solve(weight, hessian, Grid(4), 16, damp=0.0), 16)
    assert bool(result.isfinite().all())
    exact = quadratic_error(result - weight, hessian)
    assert bool((exact <= quadratic_error(Grid(4).round_trip(weight, 16) - weight, hessian)).all())


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.zeros(8, 8), "layer 'a' is dead"),
        (torch.full((8, 8), float("nan")), "layer 'a'.*NaN or infinite"),
        (torch.eye(8) * float("inf"), "layer 'a'.*NaN or infinite"),
        (torch.eye(8) - 100 * torch.ones(8, 8), "layer 'a'.*singular even with damping"),
    ],
)
def test_hopeless_hessians_are_refused_by_name(hessian, message):
    with pytest.raises(ValueError, match=message):
        inverse_factor(hessian, 0.01, "layer 'a'")


def test_sweep_with_any_replacement_is_optimal():
    """Setting columns to zero, the rest must end where least squares puts it."""
    weight, hessian = problem(5, 24, 100)
    columns = weight.T.contiguous()
    zeroed = range(8)
    keep = list(range(8, 24))
    order = [*zeroed, *keep]
    sweep(
        columns,
        inverse_factor(hessian[order][:, order], 0.0, ""),
        [(0, 8), (8, 24)],
        lambda j: torch.zeros(5) if j < 8 else columns[j].clone(),
    )
    # min over v of ‖(W - [0, v]) X‖: H_kk (v - w_k) = H_kz w_z
    moved = torch.linalg.solve(
        hessian[keep][:, keep].double(),
        (hessian[keep][:, list(zeroed)].double()) @ weight.T[:8].double(),
    )
    torch.testing.assert_close(
        columns[8:].double(), weight.T[8:].double() + moved, rtol=1e-3, atol=1e-4
    )
