"""Covering arrays: few rows in which every pair of values of every two axes occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(axes: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows of one value for each axis, greedily few; the same in every run."""
    chosen = random.Random(seed)
    names = list(axes)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(axes[a])), range(len(axes[b])))
    }

    def covered(row: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}

    rows = []
    for a, i, b, j in sorted(missing):
        if (a, i, b, j) not in missing:
            continue
        # Rows that hold this pair: the best of a few dozen.
        candidates = [
            {name: chosen.randrange(len(axes[name])) for name in names} | {a: i, b: j}
            for _ in range(40)
        ]
        best = max(candidates, key=lambda row: len(covered(row) & missing))
        missing -= covered(best)
        rows.append({name: axes[name][best[name]] for name in names})
    return rows
