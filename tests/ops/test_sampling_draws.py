"""Seeds and positions: Philox's numbers, and that what is drawn has the distribution it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pumice
from backends import Backend
from sampling_reference import Filters, chi_square_excess, filtered, uniform

SEEDS = [0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1]
POSITIONS = [0, 1, 2**33, -1, 12345678901, 7]


def test_numbers_are_philoxs(backend: Backend) -> None:
    """Among 2^k equal tokens the one drawn is the number's first k bits."""
    vocab = 1 << (20 if backend.name != "emulated" else 12)
    x = torch.zeros(1, vocab, device=backend.device).expand(len(SEEDS), vocab)
    seeds, positions = (torch.tensor(v, device=backend.device) for v in (SEEDS, POSITIONS))
    tokens, _ = pumice.ops.sample(x, seeds=seeds, positions=positions)
    numbers = [uniform(s, p, 0, 0) for s, p in zip(SEEDS, POSITIONS, strict=True)]
    assert tokens.tolist() == [n * vocab >> 32 for n in numbers]


def test_numbers_of_verification(backend: Backend) -> None:
    """Number i of a sequence, from another stream than those of sample()."""
    drafts, vocab = 3, 4096
    b = len(SEEDS)
    probs = torch.full((b, drafts + 1, vocab), 1 / vocab, device=backend.device)
    seeds, positions = (torch.tensor(v, device=backend.device) for v in (SEEDS, POSITIONS))
    # Every draft is accepted; the last token is the last number's first bits.
    for count in range(drafts + 1):
        tokens, accepted = pumice.ops.speculative_verify(
            torch.full((b, drafts), 5, device=backend.device), probs, draft_probs=probs[:, 1:],
            num_drafts=torch.full((b,), count, dtype=torch.int32, device=backend.device),
            seeds=seeds, positions=positions,
        )  # fmt: skip
        assert accepted.tolist() == [count] * b
        numbers = [uniform(s, p, count, 1) for s, p in zip(SEEDS, POSITIONS, strict=True)]
        assert tokens[:, count].tolist() == [n * vocab >> 32 for n in numbers]
    # A certain draft is accepted while its number is below p, here a half.
    half = torch.zeros(b, drafts + 1, 2, device=backend.device) + 0.5
    drafted = torch.zeros(b, drafts, dtype=torch.int64, device=backend.device)
    _, accepted = pumice.ops.speculative_verify(drafted, half, seeds=seeds, positions=positions)
    for row, (s, p) in enumerate(zip(SEEDS, POSITIONS, strict=True)):
        low = [uniform(s, p, i, 1) < 1 << 31 for i in range(drafts)]
        assert accepted[row] == (low.index(False) if False in low else drafts)


def test_without_numbers_they_are_torchs(backend: Backend) -> None:
    x = torch.zeros(4, 50, device=backend.device)
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(pumice.ops.sample(x)[0].tolist())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "filters",
    [Filters(), Filters(temperature=1.5, top_k=5), Filters(top_p=0.8), Filters(min_p=0.2)],
    ids=["plain", "top_k", "top_p", "min_p"],
)
def test_distribution(backend: Backend, filters: Filters) -> None:
    rows = 50000 if backend.name != "emulated" else 200
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 0.5, 1.2, -0.3, 0.9]) / 2
    expected, undecided = filtered(logits.double().numpy(), filters)
    assert not undecided
    seeds, positions = torch.full((rows,), 42), torch.arange(rows)
    tokens, _ = pumice.ops.sample(
        logits.to(backend.device).expand(rows, 8),
        temperature=filters.temperature, top_k=filters.top_k, top_p=filters.top_p,
        min_p=filters.min_p, seeds=seeds.to(backend.device), positions=positions.to(backend.device),
    )  # fmt: skip
    counts = np.bincount(tokens.cpu().numpy(), minlength=8).astype(float)
    assert abs(chi_square_excess(counts, expected)) < 4
    # As many draws would tell a distribution that is off by a few per cent.
    if backend.name != "emulated":
        tilted = expected * np.linspace(0.95, 1.05, 8)
        assert chi_square_excess(counts, tilted / tilted.sum()) > 4
