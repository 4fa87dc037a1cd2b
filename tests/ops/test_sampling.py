"""Filtered distributions and sampling, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import pumice
from backends import Backend
from sampling_reference import Filters, drawn, filtered

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def logits_of(kind: str, rows: int, vocab: int, seed: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab, generator=g) * 3
    if kind == "ties":
        x = x.round()
    elif kind == "equal":
        x = torch.full_like(x, -1.5)
    elif kind == "peaks":  # what language models give
        x = x + 12 * (torch.rand(rows, vocab, generator=g) < 3 / vocab)
    elif kind == "specials":
        pick = torch.rand(rows, vocab, generator=g)
        x = x.masked_fill(pick < 0.2, -torch.inf).masked_fill(pick > 0.8, torch.nan)
        x[:, seed % vocab] = 0.5
    return x.to(dtype)


def tensors_of(filters: list[Filters], device: str) -> dict[str, Any]:
    return {
        "temperature": torch.tensor([f.temperature for f in filters], device=device),
        "top_k": torch.tensor([f.top_k for f in filters], dtype=torch.int32, device=device),
        "top_p": torch.tensor([f.top_p for f in filters], device=device),
        "min_p": torch.tensor([f.min_p for f in filters], device=device),
    }


def exact(f: Filters) -> Filters:
    """As float32 keeps it."""
    t, p, m = (float(np.float32(v)) for v in (f.temperature, f.top_p, f.min_p))
    return Filters(t, f.top_k, p, m)


filters_drawn = st.builds(
    Filters,
    temperature=st.sampled_from([1.0, 1.0, 0.0, 0.3, 0.7, 2.5]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 50, 600, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.99, 0.99999]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.2, 1.0]),
)


@st.composite
def cases(draw: st.DrawFn, largest: int) -> tuple[Tensor, list[Filters]]:
    rows = draw(st.integers(0, 3))
    vocab = draw(st.one_of(st.integers(1, 40), st.integers(1, largest)))
    kind = draw(st.sampled_from(["plain", "plain", "ties", "equal", "peaks", "specials"]))
    x = logits_of(kind, rows, vocab, draw(st.integers(0, 1000)), draw(st.sampled_from(DTYPES)))
    return x, [exact(draw(filters_drawn)) for _ in range(rows)]


def test_against_float64(backend: Backend) -> None:
    @backend.for_all(cases(3000 if backend.name != "emulated" else 1300))
    def property_holds(case: tuple[Tensor, list[Filters]]) -> None:
        x, filters = case
        keywords = tensors_of(filters, backend.device)
        u = torch.rand(len(filters), generator=torch.Generator().manual_seed(x.shape[1]))
        given = x.to(backend.device)
        probs = pumice.ops.sampling_probs(given, **keywords).cpu()
        tokens, logprobs = pumice.ops.sample(given, uniforms=u.to(backend.device), **keywords)
        assert (probs.shape, probs.dtype) == (x.shape, torch.float32)
        assert (tokens.dtype, logprobs.dtype) == (torch.int64, torch.float32)
        for row, f in enumerate(filters):
            expected, undecided = filtered(x[row].double().numpy(), f)
            if undecided:
                continue
            found = probs[row].double().numpy()
            kept = expected > 0
            assert np.array_equal(found > 0, expected > 2.0**-126) or np.all(found[~kept] == 0)
            assert np.allclose(found, expected, rtol=2e-6, atol=1e-37)
            token = int(tokens[row])
            assert token in drawn(expected, float(u[row]))
            assert abs(float(logprobs[row]) - np.log(expected[token])) < 4e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_as_good_as_torchs(backend: Backend, dtype: torch.dtype) -> None:
    """Relative errors of all probabilities, of small ones too, beside torch's own softmax."""
    x = logits_of("peaks", 3, 2000, 1, dtype).to(backend.device)
    for temperature in (1.0, 0.37, 3.0):
        exact_probs = (x.double() / float(np.float32(temperature))).softmax(-1)
        ours = pumice.ops.sampling_probs(x, temperature=temperature)
        theirs = (x.float() / temperature).softmax(-1)
        error, their_error = (((p.double() - exact_probs) / exact_probs).abs().max().item()
                              for p in (ours, theirs))  # fmt: skip
        assert error < max(2 * their_error, 1e-6)


def test_greedy_is_argmax(backend: Backend) -> None:
    for kind, dtype in (("plain", torch.float32), ("ties", torch.bfloat16), ("equal", torch.half)):
        x = logits_of(kind, 4, 1031, 2, dtype).to(backend.device)
        best = torch.from_numpy(x.double().cpu().numpy().argmax(-1))  # torch's takes any of equals
        for keywords in ({}, {"top_k": 3, "top_p": 0.1, "min_p": 0.5}):
            tokens, logprobs = pumice.ops.sample(x, temperature=0, **keywords)
            assert torch.equal(tokens.cpu(), best)
            assert not logprobs.any()
            probs = pumice.ops.sampling_probs(x, temperature=0, **keywords).cpu()
            assert torch.equal(probs, torch.nn.functional.one_hot(best, 1031).float())


def test_cumulative_sums_decide(backend: Backend) -> None:
    """Token i for u in [sum before, sum with it), every border hit exactly."""
    x = torch.log(torch.tensor([1.0, 2.0, 4.0, 1.0])).repeat(9, 1)
    u = torch.tensor([0, 0.124, 0.1251, 0.374, 0.3751, 0.874, 0.8751, 1 - 2**-24, 1.0])
    tokens, _ = pumice.ops.sample(x.to(backend.device), uniforms=u.to(backend.device))
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    # Weights that are powers of two are exact: borders belong to the token that begins there.
    equal = torch.zeros(8, 8, device=backend.device)
    u = torch.arange(8) / 8
    for shift, expected in ((0.0, range(8)), (-(2**-24), (0, *range(7)))):
        moved = (u + shift).to(backend.device)
        tokens, logprobs = pumice.ops.sample(equal, uniforms=moved)
        assert tokens.tolist() == list(expected)
        assert torch.allclose(logprobs, torch.tensor(1 / 8, device=backend.device).log())


def test_borders_between_pieces_of_a_row(backend: Backend) -> None:
    """Kernels add up chunks, segments, units: a border of theirs is one like others."""
    for vocab in (512, 4096):
        equal = torch.zeros(8, vocab, device=backend.device)
        u = (torch.arange(8) / 8).to(backend.device)
        tokens, _ = pumice.ops.sample(equal, uniforms=u)
        assert tokens.tolist() == [vocab // 8 * i for i in range(8)]


def test_top_p_is_a_part_of_what_min_p_removes_too(backend: Backend) -> None:
    """After top_k, before min_p: 0.5 does not reach 0.6 of all, though 0.6 of 0.8."""
    x = torch.full((1, 700), -torch.inf)
    x[0, [3, 200, 400, 699]] = torch.tensor([0.5, 0.3, 0.1, 0.1]).log()
    for keywords in ({"top_k": 4}, {"top_k": 600}, {}):
        probs = pumice.ops.sampling_probs(x.to(backend.device), top_p=0.6, min_p=0.5, **keywords)
        assert probs[0].nonzero().flatten().tolist() == [3, 200]


def test_ties_are_cut_at_the_first(backend: Backend) -> None:
    x = torch.zeros(1, 700, device=backend.device)
    x[0, 650] = 1.0
    for keywords, kept in (
        ({"top_k": 4}, [0, 1, 2, 650]),
        ({"top_k": 1}, [650]),
        ({"top_k": 651}, [*range(650), 650]),
        ({"top_p": 2.5 / 701.71828}, [650]),
        ({"top_p": 2.8 / 701.71828}, [0, 650]),
        ({"top_k": 3, "top_p": 0.7}, [0, 650]),
        ({"min_p": 0.99}, [650]),
    ):
        probs = pumice.ops.sampling_probs(x, **keywords)
        assert probs[0].nonzero().flatten().tolist() == kept
        if len(kept) < 10:
            u = torch.tensor([0.999], device=backend.device)
            assert pumice.ops.sample(x, uniforms=u, **keywords)[0].item() == 650


def test_minus_zero_is_zero(backend: Backend) -> None:
    x = torch.tensor([[-0.0, 0.0, -0.0, -1.0]], device=backend.device)
    assert pumice.ops.sampling_probs(x, top_k=1).tolist() == [[1, 0, 0, 0]]
    assert pumice.ops.sampling_probs(x, top_k=2).tolist() == [[0.5, 0.5, 0, 0]]


def test_rows_without_a_distribution(backend: Backend) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[nan] * 5, [-inf] * 5, [nan, -inf, nan, -inf, -inf],
                      [inf, 0, inf, nan, -inf], [nan, nan, -3e38, nan, 3e38]])  # fmt: skip
    x = x.to(backend.device)
    u = torch.full((5,), 0.7, device=backend.device)
    for keywords in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.5}):
        probs = pumice.ops.sampling_probs(x, **keywords).cpu()
        tokens, logprobs = pumice.ops.sample(x, uniforms=u, **keywords)
        assert probs[:3].isnan().all()
        assert logprobs[:3].isnan().all()
        assert tokens.tolist() == [0, 0, 0, 2, 4]
        assert probs[3].tolist() == [0.5, 0, 0.5, 0, 0]
        assert probs[4].tolist() == [0, 0, 0, 0, 1]
    tokens, logprobs = pumice.ops.sample(x, uniforms=u, temperature=0)
    assert tokens.tolist() == [0, 0, 0, 0, 4]
    assert logprobs[:3].isnan().all()
    assert not logprobs[3:].any()


def test_odd_parameters_are_defined(backend: Backend) -> None:
    """In a tensor, which nobody looks at before."""
    x = torch.tensor([[0.0, 2.0, 1.0]], device=backend.device)
    plain = x.softmax(-1)

    def probs(**keywords: float) -> Tensor:
        types = {"top_k": torch.int32}
        tensors = {k: torch.tensor([v], dtype=types.get(k, torch.float32), device=backend.device)
                   for k, v in keywords.items()}  # fmt: skip
        return pumice.ops.sampling_probs(x, **tensors)

    greedy = [[0.0, 1.0, 0.0]]
    for temperature in (-1.0, torch.nan, 1e-30, 1e-45):
        assert probs(temperature=temperature).tolist() == greedy
    assert torch.allclose(probs(temperature=torch.inf), torch.full_like(x, 1 / 3))
    for off in ({"top_k": -3}, {"top_k": 9}, {"top_p": 2.0}, {"top_p": torch.nan},
                {"min_p": -1.0}, {"min_p": torch.nan}):  # fmt: skip
        assert torch.allclose(probs(**off), plain, atol=1e-7)
    for one in ({"top_p": -1.0}, {"top_p": 0.0}, {"min_p": 3.0}, {"top_k": 1}):
        assert probs(**one).tolist() == greedy


def test_any_strides(backend: Backend) -> None:
    x = logits_of("peaks", 6, 500, 3, torch.float32).to(backend.device)
    u = torch.rand(6, generator=torch.Generator().manual_seed(0)).to(backend.device)
    padded = torch.full((6, 509), torch.nan, device=backend.device)
    padded[:, 7:507] = x
    twisted = x.t().contiguous().t()
    for same in (padded[:, 7:507], twisted, x[:1].expand(6, 500)):
        dense = same.clone()
        keywords = {"top_p": 0.9}
        for ours, expected in zip(pumice.ops.sample(same, uniforms=u, **keywords),
                                  pumice.ops.sample(dense, uniforms=u, **keywords),
                                  strict=True):  # fmt: skip
            assert torch.equal(ours, expected)
        assert torch.equal(pumice.ops.sampling_probs(same), pumice.ops.sampling_probs(dense))


def test_a_row_does_not_depend_on_others(backend: Backend) -> None:
    x = logits_of("peaks", 5, 900, 4, torch.bfloat16).to(backend.device)
    seeds, positions = (torch.arange(5, device=backend.device) + i for i in (100, 7))
    together = pumice.ops.sample(x, top_p=0.9, seeds=seeds, positions=positions)
    for row in range(5):
        one = slice(row, row + 1)
        alone = pumice.ops.sample(x[one], top_p=0.9, seeds=seeds[one], positions=positions[one])
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("vocab", [49152, 50257])
def test_large_vocabularies_on_every_device_alike(backend: Backend, vocab: int) -> None:
    """Tokens, and the bits of probabilities, are the CPU's; filters that leave few and many."""
    if backend.name == "cpu":
        pytest.skip("the reference")
    cpu = torch.ops.pumice
    x = torch.cat([logits_of("peaks", 1, vocab, 5, torch.float32),
                   logits_of("ties", 1, vocab, 6, torch.float32)])  # fmt: skip
    for dtype, filters in (
        (torch.float32, Filters(top_k=40, top_p=0.9)),
        (torch.bfloat16, Filters(temperature=1.7, top_p=0.95)),
        (torch.float16, Filters(top_k=3000, min_p=0.001)),
    ):
        given = x.to(dtype)
        parameters = tuple(tensors_of([exact(filters)] * 2, "cpu").values())
        u = torch.tensor([0.31, 0.92])
        tokens, logprobs = cpu.sample(given, *parameters, u, None, None)
        moved = [p.to(backend.device) for p in parameters]
        found = backend.ops.sample(given.to(backend.device), *moved, u.to(backend.device),
                                   None, None)  # fmt: skip
        assert torch.equal(found[0].cpu(), tokens)
        assert torch.allclose(found[1].cpu(), logprobs, atol=1e-6)
        probs = backend.ops.sampling_probs(given.to(backend.device), *moved)
        assert torch.equal(probs.cpu(), cpu.sampling_probs(given, *parameters))
