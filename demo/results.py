"""The demo's numbers: gathered, printed, judged and stored."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from demo.methods import LLM_INT8, NAIVE, UNCOMPRESSED, Method
from pumice.evaluate import Perplexity, Throughput

# What the paper is about, as bounds on perplexity relative to the uncompressed model.
NAIVE_IS_WORSE_BY = 1.5
LLM_INT8_IS_WITHIN = 0.02


@dataclass
class Row:
    """One method's measurements; speed comes in rounds, interleaved with the other methods'."""

    method: Method
    quality: Perplexity
    size: int
    rounds: list[Throughput] = field(default_factory=list)

    @property
    def prefill(self) -> float:
        return statistics.median(speed.prefill for speed in self.rounds)

    @property
    def decode(self) -> float:
        return statistics.median(speed.decode for speed in self.rounds)


Rows = Mapping[str, Row]


def table(rows: Rows) -> Table:
    """Every number beside the uncompressed model's, in 80 columns; speeds in tokens a second."""
    base = rows[UNCOMPRESSED.name]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("method", no_wrap=True)
    for heading in ("perplexity", "MB", "prefill/s", "decode/s"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in rows.values():
        ratio, _ = row.quality.relative_to(base.quality)
        cells = [
            (f"{row.quality.perplexity:.2f}", _percent(ratio - 1), 5),
            (f"{row.size / 1e6:.0f}", f"{row.size / base.size:.0%}", 4),
            (f"{row.prefill:.0f}", f"×{row.prefill / base.prefill:.2f}", 5),
            (f"{row.decode:.1f}", f"×{row.decode / base.decode:.2f}", 5),
        ]
        # What is beside a number has a fixed width, so that the numbers stand below each other.
        grid.add_row(
            row.method.label,
            *(
                f"{number} {'' if row is base else beside:>{width}}"
                for number, beside, width in cells
            ),
            style="bold" if row.method is LLM_INT8 else "",
        )
    return grid


def _percent(change: float) -> str:
    return f"{change:+.0%}" if abs(change) >= 0.1 else f"{change:+.1%}"


def verdict(rows: Rows) -> list[tuple[str, bool]]:
    """The two statements that the demo stands for, and whether they hold. NaN is a no."""
    base = rows[UNCOMPRESSED.name].quality
    naive, naive_error = rows[NAIVE.name].quality.relative_to(base)
    mixed, mixed_error = rows[LLM_INT8.name].quality.relative_to(base)
    return [
        (
            f"naive int8 falls apart: perplexity ×{naive:.2f} ± {naive_error:.2f} "
            f"(at least ×{NAIVE_IS_WORSE_BY})",
            naive >= NAIVE_IS_WORSE_BY,
        ),
        (
            f"{LLM_INT8.label}, keeps the model: perplexity {mixed - 1:+.2%} ± {mixed_error:.2%} "
            f"(within {LLM_INT8_IS_WITHIN:.0%})",
            abs(mixed - 1) <= LLM_INT8_IS_WITHIN,
        ),
    ]


def store(path: Path, rows: Rows, setting: Mapping[str, Any]) -> None:
    """All of it as JSON: the setting, and each row with its samples."""
    stored = {
        "setting": dict(setting),
        "rows": [
            {
                "method": row.method.name,
                "label": row.method.label,
                "recipe": row.method.recipe.to_dict() if row.method.recipe else None,
                "perplexity": asdict(row.quality),
                "bytes": row.size,
                "prefill_tokens_per_second": row.prefill,
                "decode_tokens_per_second": row.decode,
                "rounds": [asdict(speed) for speed in row.rounds],
            }
            for row in rows.values()
        ],
        "verdict": [{"statement": text, "holds": holds} for text, holds in verdict(rows)],
    }
    path.write_text(json.dumps(stored, indent=1), encoding="utf-8")
