"""The rows of pruning methods in :mod:`bench.quality`.

A row is METHOD:AMOUNT, the amount 50% or 2of4 (of every 4 weights 2 stay), or METHOD:AMOUNT:BITS:
GROUP where what stays is quantized too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pumice import RTN, Magnitude, PruneAndTune, SparseGPT, Wanda
from pumice.quantize import Recipe

Amount = dict[str, Any]

# Calls of pumice.compress, one after the other, from the amount, the bits and the group.
METHODS: dict[str, Callable[[Amount, int, int], list[Recipe]]] = {
    "magnitude": lambda amount, b, g: [Magnitude(**amount)],
    "magnitude-row": lambda amount, b, g: [Magnitude(**amount, compare="row")],
    "wanda": lambda amount, b, g: [Wanda(**amount)],
    "wanda-layer": lambda amount, b, g: [Wanda(**amount, compare="layer")],
    "sparsegpt": lambda amount, b, g: [SparseGPT(**amount)],
    # One sweep that prunes and quantizes, beside one after the other.
    "sparsegpt-joint": lambda amount, b, g: [
        SparseGPT(**amount, bits=b, group_size=g, symmetric=False)
    ],
    "sparsegpt-then-rtn": lambda amount, b, g: [
        SparseGPT(**amount, store="dense"),
        RTN(b, g, symmetric=False),
    ],
    "tune": lambda amount, b, g: [PruneAndTune(**amount, **TUNING)],
    "tune-wanda": lambda amount, b, g: [PruneAndTune(**amount, criterion="wanda", **TUNING)],
    "tune-lora": lambda amount, b, g: [
        PruneAndTune(**amount, **{**TUNING, "rank": 16, "learning_rate": 1e-3})
    ],
    # The same training after one shot of pruning: what the rounds are for.
    "tune-once": lambda amount, b, g: [
        PruneAndTune(**amount, **{**TUNING, "rounds": 1, "steps": 72})
    ],
}
# 72 steps of one sample: minutes of a core, where the paper trains for hours.
TUNING: Amount = {"rounds": 3, "steps": 24, "batch": 1, "learning_rate": 2e-4, "samples": 16}
_WITHOUT_DATA = ("magnitude", "magnitude-row")


def is_pruning(row: str) -> bool:
    return row.split(":")[0] in METHODS


def needs_data(row: str) -> bool:
    return row.split(":")[0] not in _WITHOUT_DATA


def recipes(row: str) -> list[Recipe]:
    """What to do to the model, one call of pumice.compress after the other."""
    method, amount, *quantization = row.split(":")
    bits, group = map(int, quantization or (4, 64))
    return METHODS[method](_amount(amount), bits, group)


def _amount(text: str) -> Amount:
    if text.endswith("%"):
        return {"ratio": float(text[:-1]) / 100}
    return {"pattern": text.replace("of", ":")}
