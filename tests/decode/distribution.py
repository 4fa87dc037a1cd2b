"""Whether generated sequences follow the model's distribution: exact probabilities and a test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from pumice.decode.request import SamplingParams
from pumice.ops.sampling import sampling_probs

Sequence = tuple[int, ...]


@torch.no_grad()
def next_probs(model: nn.Module, texts: list[list[int]], params: SamplingParams) -> torch.Tensor:
    """[texts, V]: of the token after each text, all of one length; the whole text through the
    model."""
    return sampling_probs(
        model(torch.tensor(texts)).logits[:, -1].float(),
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
    )


def joint(
    model: nn.Module, prompt: list[int], length: int, params: SamplingParams
) -> dict[Sequence, float]:
    """The probability of every continuation of so many tokens that has any."""
    found: dict[Sequence, float] = {(): 1.0}
    for _ in range(length):
        probs = next_probs(model, [[*prompt, *begun] for begun in found], params).double()
        found = {
            (*begun, token): p * float(row[token])
            for (begun, p), row in zip(found.items(), probs, strict=True)
            for token in row.nonzero().flatten().tolist()
        }
    return found


def surprise(drawn: Iterable[Sequence], probabilities: Mapping[Sequence, float]) -> float:
    """How many standard deviations the chi-square statistic of a sample lies above its mean.

    Cells of which fewer than 5 are expected are put together. Wilson and Hilferty's approximation:
    the cube root of chi-square is nearly normal. Infinite where something impossible was drawn.
    """
    counts = Counter(drawn)
    if any(sequence not in probabilities for sequence in counts):
        return float("inf")
    total = sum(counts.values())
    cells: list[tuple[float, int]] = []
    rare = [0.0, 0]
    for sequence, p in probabilities.items():
        if p * total < 5:
            rare[0] += p * total
            rare[1] += counts[sequence]
        else:
            cells.append((p * total, counts[sequence]))
    if rare[0] >= 5:
        cells.append((rare[0], int(rare[1])))
    freedom = len(cells) - 1
    assert freedom >= 5, "too few outcomes to tell anything"
    chi_square = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    spread = 2 / (9 * freedom)
    return float(((chi_square / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5)


FALSE_ALARM = 4.75  # one in a million; seeds are fixed, so a test that passes passes again
