"""The sampling operators in float64 numpy, by their definitions: sorting, sums, loops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# What float32 weights and probabilities may be off by; decisions closer than that are open.
CLOSE = 2e-6


@dataclass(frozen=True)
class Filters:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def softmax(x: Floats) -> Floats:
    weights = np.exp(x - x.max())
    distribution: Floats = weights / weights.sum()
    return distribution


def is_open(mass_before: Floats, top_p: float) -> bool:
    """Whether rounding may decide where top_p cuts."""
    return bool(np.any(np.abs(mass_before - top_p) < CLOSE))


def filtered(logits: Floats, filters: Filters) -> tuple[Floats, bool]:
    """A row's distribution, and whether it is open to rounding."""
    x = np.where(np.isnan(logits), -np.inf, logits)
    probs = np.zeros_like(x)
    if filters.temperature == 0:
        probs[np.argmax(x)] = 1
        return probs, False
    order = np.argsort(-x, kind="stable")  # of equals the first before the others
    p = softmax(x / filters.temperature)
    kept = order[: filters.top_k] if filters.top_k > 0 else order
    undecided = False
    if filters.top_p < 1:
        ranked = p[kept] / p[kept].sum()
        before = np.concatenate(([0.0], np.cumsum(ranked)[:-1]))
        undecided = is_open(before, filters.top_p)
        kept = kept[(before < filters.top_p) | (np.arange(len(kept)) == 0)]
    if filters.min_p > 0:
        share = p[kept] / p.max()
        undecided |= bool(np.any(np.abs(share / filters.min_p - 1) < CLOSE) and filters.min_p < 1)
        kept = kept[share >= filters.min_p]
    probs[kept] = p[kept]
    return probs / probs.sum(), undecided


def drawn(probs: Floats, u: float) -> set[int]:
    """The tokens that u may draw: one, or two where it lies on their border."""
    running = np.cumsum(probs) / probs.sum()
    support = np.flatnonzero(probs > 0)
    passing = [support[np.searchsorted(running[support], v, side="right").clip(0, len(support) - 1)]
               for v in (u - CLOSE, u, u + CLOSE)]  # fmt: skip
    return {int(token) for token in passing}


@dataclass
class Walk:
    """What verification may do; `undecided` where u is within rounding of a decision."""

    accepted: list[int]  # nodes
    rest: Floats  # the distribution of the last token
    last_uniform: int
    undecided: bool


def walk(
    draft_tokens: Sequence[int],
    parents: Sequence[int],
    draft_probs: Floats | None,
    target_probs: Floats,
    uniforms: Floats,
) -> Walk:
    """Multi-step rejection over a tree (a chain: parents -1, 0, 1, ...)."""
    node, p = -1, target_probs[0]
    accepted: list[int] = []
    undecided = False
    for n, (token, parent) in enumerate(zip(draft_tokens, parents, strict=True)):
        if parent != node:
            continue
        q = draft_probs[n] if draft_probs is not None else np.eye(len(p))[token]
        share = p[token] / q[token] if q[token] > 0 else np.inf * p[token]
        undecided |= bool(abs(uniforms[n] - share) < CLOSE)
        if uniforms[n] < share:
            accepted.append(n)
            node, p = n, target_probs[n + 1]
        else:
            left = np.maximum(p - q, 0)
            p = left / left.sum() if left.sum() > 0 else p
    drafts = [n for n, parent in enumerate(parents) if parent >= -1]
    return Walk(accepted, p, drafts[-1] + 1 if drafts else 0, undecided)


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., 2011), in Python's integers."""
    c, (k0, k1) = list(counter), key
    low = 0xFFFFFFFF
    for _ in range(10):
        m0, m1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(m1 >> 32) ^ c[1] ^ k0, m1 & low, (m0 >> 32) ^ c[3] ^ k1, m0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c


def uniform(seed: int, position: int, index: int, purpose: int) -> int:
    """The number of a draw, in units of 2^-32."""
    low = 0xFFFFFFFF
    counter = [position & low, position >> 32 & low, index, purpose]
    return philox4x32(counter, [seed & low, seed >> 32 & low])[0]


def chi_square_excess(counts: Floats, probs: Floats) -> float:
    """How many standard deviations Pearson's statistic lies above its mean, by Wilson and
    Hilferty's cube root; below 4 but once in 30000 where the counts are drawn from probs."""
    expected = probs * counts.sum()
    assert np.all(counts[expected == 0] == 0), "drawn, though of probability 0"
    possible = expected > 0
    assert expected[possible].min() >= 5, "too few draws for the approximation"
    statistic = np.sum((counts[possible] - expected[possible]) ** 2 / expected[possible])
    spread = 2 / (9 * (possible.sum() - 1))
    return float(((statistic / (possible.sum() - 1)) ** (1 / 3) - (1 - spread)) / np.sqrt(spread))
