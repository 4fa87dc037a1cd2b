"""Results: one JSON file a machine, and the Markdown and the picture made from it."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.machine import Machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One contender on one case. Times in microseconds; `floor_us` as `Machine.floor_us`."""

    op: str
    case: str
    contender: str
    median_us: float
    low_us: float
    high_us: float
    floor_us: float
    baseline_us: float  # the contender that the others are compared with, in the same run
    kernels: tuple[str, ...] = ()  # pumice kernels that ran, as in the catalogue
    operations: int = 0  # where a rate says more than a time

    @property
    def speedup(self) -> float:
        return self.baseline_us / self.median_us

    @property
    def tflops(self) -> float:
        return self.operations / self.median_us * 1e-6

    @property
    def bound_tflops(self) -> float:
        """The rate at the floor."""
        return self.operations / self.floor_us * 1e-6


def record(machine: Machine, op: str, rows: Iterable[Row], folder: Path = RESULTS) -> Path:
    """Put the rows of `op` into the machine's file, in place of what stood there for that op."""
    import pumice
    from pumice import _C

    path = folder / f"{machine.slug()}.json"
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"ops": {}}
    rows = list(rows)
    used = {kernel for row in rows for kernel in row.kernels}
    stored["machine"] = machine.to_dict()
    stored["ops"][op] = {
        "date": datetime.date.today().isoformat(),
        "torch": str(torch.__version__),
        "pumice": pumice.__version__,
        "bandwidth": machine.bandwidth,  # of this run: that of the floors
        "digests": {
            kernel["name"]: kernel["digest"]
            for kernel in _C.kernels()
            if kernel["name"] in used and kernel["device"] == machine.device
        },
        "rows": [asdict(row) for row in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(stored, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The machine and the ops of a results file."""
    stored = json.loads(path.read_text())
    return stored["machine"], stored["ops"]


def rows_of(entry: dict[str, Any]) -> list[Row]:
    return [Row(**{**row, "kernels": tuple(row["kernels"])}) for row in entry["rows"]]


def markdown(rows: list[Row]) -> str:
    """Cases down, contenders across: microseconds and the speed-up over the baseline. With
    operations: TFLOP/s, their share of the bound, and the speed-up."""
    rates = any(row.operations for row in rows)
    contenders = list(dict.fromkeys(row.contender for row in rows))
    cells = {(row.case, row.contender): row for row in rows}
    heading = "TFLOP/s (% of bound, × baseline) | bound" if rates else "µs (× baseline) | floor"
    lines = [f"| {heading} | " + " | ".join(contenders) + " |"]
    lines.append("|---" * (len(contenders) + 2) + "|")
    cell, limit = (_rate, _bound) if rates else (_time, _floor)
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [cells.get((case, name)) for name in contenders]
        shown = [cell(row) if row else "–" for row in of_case]
        best = min((row for row in of_case if row), key=lambda row: row.floor_us)
        lines.append(f"| {case} | {limit(best)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits, or whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(row: Row) -> str:
    return f"{number(row.median_us)} ({row.speedup:.2f})"


def _floor(row: Row) -> str:
    return number(row.floor_us)


def _rate(row: Row) -> str:
    share = row.floor_us / row.median_us
    return f"{number(row.tflops)} ({share:.0%}, {row.speedup:.2f})"


def _bound(row: Row) -> str:
    return number(row.bound_tflops)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """A group of bars for each case: the speed-up over the baseline, or with operations TFLOP/s,
    below a line at the bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = any(row.operations for row in rows)
    cases = list(dict.fromkeys(row.case for row in rows))
    contenders = list(dict.fromkeys(row.contender for row in rows))
    cells = {(row.case, row.contender): row for row in rows}
    size = (min(40.0, max(8.0, 1.6 * len(cases))), 4.5)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    width = 0.85 / len(contenders)
    for index, name in enumerate(contenders):
        of_cases = [cells.get((case, name)) for case in cases]
        heights = [(row.tflops if rates else row.speedup) if row else 0.0 for row in of_cases]
        places = [i + (index - (len(contenders) - 1) / 2) * width for i in range(len(cases))]
        axes.bar(places, heights, width, label=name)
    if rates:
        bounds = [next(row.bound_tflops for row in rows if row.case == case) for case in cases]
        axes.hlines(
            bounds,
            [i - 0.45 for i in range(len(cases))],
            [i + 0.45 for i in range(len(cases))],
            color="black",
            linewidth=0.8,
        )
        axes.set_ylabel("TFLOP/s")
    else:
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylabel("speed-up over the baseline")
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right")
    axes.set_title(title)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
