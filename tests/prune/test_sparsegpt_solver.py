"""The SparseGPT solver against a slow derivation, and what it promises for any input."""

import hypothesis.strategies as st
import pytest
import sparsegpt_reference
import torch
from hypothesis import given, settings

from pumice.prune.pattern import NofM, keep, zeros_of
from pumice.prune.sparsegpt_solver import Part, solve
from pumice.quantize.gptq_solver import solve as solve_gptq
from pumice.quantize.grid import Grid, expand
from pumice.quantize.obs import quadratic_error


def problem(n, k, tokens, seed=0):
    """A weight, and the Hessian of correlated inputs whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.rand(k, generator=generator).add(0.1)
    x = torch.randn(tokens, k, generator=generator) @ mix
    return torch.randn(n, k, generator=generator), 2 / tokens * x.T @ x


def amounts_of(parts):
    return [
        (p.rows, (p.amount.kept, p.amount.of) if isinstance(p.amount, NofM) else p.amount)
        for p in parts
    ]


def dequantize(integers, group_size):
    k = integers.q.shape[1]
    scale, zero = (expand(t, group_size, k) for t in (integers.scale, integers.zero))
    return (integers.q.float() - zero) * scale


PARTS = {
    "half": [Part(6, 0.5)],
    "70 %": [Part(6, 0.7)],
    "layers apart": [Part(2, 0.2), Part(1, 0.9), Part(3, 0.5)],
    "2:4": [Part(6, NofM(2, 4))],
    "4:8": [Part(6, NofM(4, 8))],
    "1:3": [Part(6, NofM(1, 3))],
    "none": [Part(6, 0.0)],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize(("k", "block_size"), [(48, 16), (24, 128), (48, 7)])
def test_equals_the_slow_derivation(parts, k, block_size):
    weight, hessian = problem(6, k, 3 * k, seed=k)
    before = weight.clone()
    solution = solve(weight, hessian, parts, block_size=block_size)
    assert torch.equal(weight, before)
    expected, kept = sparsegpt_reference.solve(weight, hessian, amounts_of(parts), block_size)
    assert torch.equal(solution.kept, kept)
    torch.testing.assert_close(solution.weight.double(), expected, rtol=1e-3, atol=1e-4)
    gone = solution.weight[~kept]
    assert torch.equal(gone.view(torch.int32), torch.zeros_like(gone, dtype=torch.int32))  # no -0.0


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("parts", [PARTS["half"], PARTS["2:4"]], ids=["half", "2:4"])
@pytest.mark.parametrize(
    ("bits", "k", "group_size", "block_size"),
    [(4, 48, 16, 16), (4, 48, 16, 32), (3, 48, -1, 16), (4, 40, 16, 16), (2, 48, 48, 128)],
)
def test_rounding_in_the_same_sweep_equals_the_slow_derivation(
    parts, bits, k, group_size, block_size, symmetric
):
    weight, hessian = problem(6, k, 3 * k, seed=bits)
    solution = solve(
        weight,
        hessian,
        parts,
        block_size=block_size,
        grid=Grid(bits, symmetric),
        group_size=group_size,
    )
    expected, kept = sparsegpt_reference.solve(
        weight,
        hessian,
        amounts_of(parts),
        block_size,
        bits=bits,
        group_size=k if group_size == -1 else group_size,
        symmetric=symmetric,
    )
    assert torch.equal(solution.kept, kept)
    torch.testing.assert_close(solution.weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(dequantize(solution.integers, group_size), solution.weight)
    assert bool((solution.weight[~kept] == 0).all())
    assert int(solution.integers.q.max()) < 2**bits


def test_nothing_pruned_is_gptq():
    weight, hessian = problem(8, 64, 300)
    solution = solve(weight, hessian, [Part(8, 0.0)], grid=Grid(4), group_size=16)
    gptq = solve_gptq(weight, hessian, Grid(4), 16)
    assert gptq.rounded_rows == 0  # GPTQ's own fallback does not blur the comparison
    assert torch.equal(solution.integers.q, gptq.q)
    assert torch.equal(solution.integers.scale, gptq.scale)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 12),
    st.integers(1, 90),
    st.integers(1, 150),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 140),
    st.integers(0, 1000),
)
def test_a_ratio_is_met_exactly(n, k, tokens, ratio, block_size, seed):
    """Whatever the shape; few tokens make H singular."""
    weight, hessian = problem(n, k, tokens, seed)
    solution = solve(weight, hessian, [Part(n, ratio)], block_size=block_size)
    assert int((~solution.kept).sum()) == zeros_of(ratio, n * k)
    assert bool(solution.weight.isfinite().all())
    assert torch.equal(solution.weight == 0, ~solution.kept)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 8),
    st.integers(1, 20),
    st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)]),
    st.integers(1, 140),
    st.sampled_from([None, 2, 4]),
    st.integers(0, 1000),
)
def test_n_of_m_holds_in_every_group(n, groups, pattern, block_size, bits, seed):
    kept, of = pattern
    weight, hessian = problem(n, groups * of, 200, seed)
    grid = None if bits is None else Grid(bits, symmetric=False)
    solution = solve(weight, hessian, [Part(n, NofM(kept, of))], block_size=block_size, grid=grid)
    assert bool((solution.kept.unflatten(1, (groups, of)).sum(2) == kept).all())
    assert bool((solution.weight[~solution.kept] == 0).all())


@pytest.mark.parametrize("amount", [0.5, 0.7, NofM(2, 4), NofM(4, 8)], ids=str)
def test_better_than_the_masks_of_wanda_and_those_than_magnitude(amount):
    """In the layer's output error, and better than its own mask without updates."""
    weight, hessian = problem(32, 128, 1024)

    def error(result):
        return float(quadratic_error(result - weight, hessian).sum())

    solution = solve(weight, hessian, [Part(32, amount)])
    magnitude = error(weight * keep(weight.abs(), amount))
    wanda = error(weight * keep(weight.abs() * hessian.diagonal().sqrt(), amount))
    assert error(solution.weight) < 0.95 * wanda
    assert wanda < 0.7 * magnitude
    assert error(solution.weight) < 0.9 * error(weight * solution.kept)


def test_pruning_and_rounding_at_once_beats_one_after_the_other():
    weight, hessian = problem(32, 128, 1024)
    parts = [Part(32, NofM(2, 4))]
    for symmetric in (True, False):
        grid = Grid(3, symmetric)
        joint = solve(weight, hessian, parts, grid=grid, group_size=32).weight
        pruned = solve(weight, hessian, parts).weight
        apart = grid.round_trip(pruned, 32)
        errors = [float(quadratic_error(w - weight, hessian).sum()) for w in (joint, apart)]
        assert errors[0] < 0.95 * errors[1]


def test_inputs_that_were_never_active_go_first_and_harm_nobody():
    weight, hessian = problem(8, 64, 200)
    dead = [3, 17, 18, 63]
    hessian[dead] = 0.0
    hessian[:, dead] = 0.0
    solution = solve(weight, hessian, [Part(8, 0.5)])
    assert not bool(solution.kept[:, dead].any())
    assert bool(solution.weight.isfinite().all())
    alive = [j for j in range(64) if j not in dead]
    alone = solve(
        weight[:, alive], hessian[alive][:, alive], [Part(8, (256 - 32) / (8 * 60))], damp=0.01
    )
    # The mean of the diagonal, and with it the damping, is what the dead inputs change.
    assert float((alone.kept != solution.kept[:, alive]).float().mean()) < 0.05


def test_damping_rises_until_a_singular_hessian_has_a_factor():
    weight, _ = problem(4, 32, 1)
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    hessian = 2 * x.T @ x  # rank one
    solution = solve(weight, hessian, [Part(4, NofM(2, 4))], damp=0.0)
    assert bool(solution.weight.isfinite().all())
    plain = weight * solution.kept
    assert float(quadratic_error(solution.weight - weight, hessian).sum()) <= float(
        quadratic_error(plain - weight, hessian).sum()
    )


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.zeros(8, 8), "layer 'a' is dead"),
        (torch.full((8, 8), float("nan")), "layer 'a'.*NaN or infinite"),
        (torch.eye(8) - 100 * torch.ones(8, 8), "layer 'a'.*singular even with damping"),
    ],
)
def test_hopeless_hessians_are_refused_by_name(hessian, message):
    with pytest.raises(ValueError, match=message):
        solve(torch.ones(2, 8), hessian, [Part(2, 0.5)], where="layer 'a'")


def test_the_size_of_blocks_does_not_matter_to_a_pattern():
    """Only a ratio's mask is chosen for a block; n of m are chosen for every m."""
    weight, hessian = problem(8, 160, 400)
    results = [
        solve(weight, hessian, [Part(8, NofM(2, 4))], block_size=b).weight
        for b in (1, 16, 100, 1000)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-3, atol=1e-4)


def test_rows_do_not_depend_on_those_beside_them_in_another_part():
    weight, hessian = problem(6, 48, 200)
    both = solve(weight, hessian, [Part(4, 0.5), Part(2, 0.3)])
    one = solve(weight[:4], hessian, [Part(4, 0.5)])
    assert torch.equal(both.kept[:4], one.kept)
    torch.testing.assert_close(both.rows(0, 4).weight, one.weight)
