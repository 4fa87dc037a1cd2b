"""Perplexity against size, one point a method."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from demo.methods import LLM_INT8, NAIVE, UNCOMPRESSED
from demo.results import LLM_INT8_IS_WITHIN, Rows

_COLOURS = {UNCOMPRESSED.name: "#555555", NAIVE.name: "#c0392b", LLM_INT8.name: "#1f6fb4"}
_OTHER = "#e08e2b"


def draw(path: Path, rows: Rows, caption: str) -> None:
    """Write the picture; the format is that of the file name's suffix."""
    with mpl.rc_context(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.fonttype": "none",
        }
    ):
        figure = Figure(figsize=(7.2, 4.4), dpi=160, layout="constrained")
        axes = figure.subplots()
        base = rows[UNCOMPRESSED.name].quality.perplexity
        axes.axhspan(base, base * (1 + LLM_INT8_IS_WITHIN), color="#1f6fb4", alpha=0.15, lw=0)
        axes.axhline(base, color="#555555", lw=0.8, ls="--", zorder=1)
        widest = max(row.size for row in rows.values()) / 1e6
        top = max(row.quality.perplexity for row in rows.values())
        low, high = base - 0.12 * (top - base), top + 0.12 * (top - base)
        # Labels are spread until they no longer touch: methods of one size lie above each other.
        gap, free = 0.075 * (high - low), -float("inf")
        for row in sorted(rows.values(), key=lambda row: row.quality.perplexity):
            x, y = row.size / 1e6, row.quality.perplexity
            colour = _COLOURS.get(row.method.name, _OTHER)
            axes.plot(x, y, "o", ms=8, color=colour, zorder=4 if row.method is LLM_INT8 else 3)
            at_right = x > 0.8 * widest
            free = max(y + (0.05 * (high - low) if y < base * 1.1 else 0), free + gap)
            axes.annotate(
                f"{row.method.label}: {y:.2f}",
                (x, y),
                xytext=(x + (-0.03 if at_right else 0.05) * widest, free),
                ha="right" if at_right else "left",
                va="center",
                color=colour,
                weight="bold" if row.method is LLM_INT8 else "normal",
                arrowprops={
                    "arrowstyle": "-",
                    "color": colour,
                    "lw": 0.7,
                    "shrinkB": 5,
                    "relpos": (1.0 if at_right else 0.0, 0.5),
                },
            )
        axes.text(
            0.01 * widest,
            base - 0.015 * (high - low),
            f"uncompressed … +{LLM_INT8_IS_WITHIN:.0%}",
            va="top",
            fontsize=8,
            color="#1f6fb4",
        )
        axes.set(
            xlim=(0, 1.08 * widest),
            ylim=(low, high),
            xlabel="size of the model (MB)",
            ylabel="perplexity (lower is better)",
        )
        axes.set_title(caption, fontsize=9, loc="left", color="#333333")
        figure.savefig(path)
