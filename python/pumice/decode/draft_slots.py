"""Where the drafts that stay lie in the cache.

A pass writes a sequence's drafts to the slots after its last token, in the order of their numbers.
Of a chain a prefix stays, which is where it belongs. Of a tree a path stays, whose nodes may lie
apart: they are moved to where a sequence without branches has them. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pumice.decode.block_manager import BlockManager, Step

__all__ = ["Moves", "keep_drafts"]


class Moves(NamedTuple):
    """Keys and values to copy before anything else is written: of ``source`` slots to
    ``destination`` slots, int64 [n] each. The two may overlap, as if all were read first."""

    source: npt.NDArray[np.int64]
    destination: npt.NDArray[np.int64]


def keep_drafts(
    manager: BlockManager,
    ids: npt.NDArray[np.int64],
    step: Step,
    tokens: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    num_drafts: npt.NDArray[np.int64],
    kept: Sequence[Sequence[int]],
) -> Moves:
    """Cut sequences to what stays of them after a pass; what the cache has to copy.

    Args:
        step: of the pass. ``tokens``: those it computed, sequence after sequence.
        counts, num_drafts: of each sequence the number of tokens, of which the last are drafts.
        kept: of each sequence the drafts that stay, by number, ascending.
    """
    in_place = np.zeros(len(ids), np.int64)
    moved: list[int] = []
    places: list[npt.NDArray[np.int64]] = []  # in the pass, of drafts that are moved
    for i, (end, drafts) in enumerate(zip(np.cumsum(counts), num_drafts, strict=True)):
        path = kept[i]
        while in_place[i] < len(path) and path[in_place[i]] == in_place[i]:
            in_place[i] += 1
        if in_place[i] < len(path):
            moved.append(i)
            places.append(end - drafts + np.array(path[in_place[i] :], np.int64))
    manager.truncate(ids, step.seq_lens - num_drafts + in_place)
    if not moved:
        return Moves(np.empty(0, np.int64), np.empty(0, np.int64))
    # The blocks that the cut gave back suffice, and the last one is nobody else's: nothing is
    # copied on write.
    of = np.concatenate(places)
    again = manager.append(ids[moved], tokens[of], [len(one) for one in places])
    return Moves(step.slot_mapping[of], again.slot_mapping)
