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

    @property
    def speedup(self) -> float:
        return self.baseline_us / self.median_us


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
    """Cases down, contenders across: microseconds, and the speed-up over the baseline."""
    contenders = list(dict.fromkeys(row.contender for row in rows))
    cells = {(row.case, row.contender): row for row in rows}
    lines = ["| µs (× baseline) | floor | " + " | ".join(contenders) + " |"]
    lines.append("|---" * (len(contenders) + 2) + "|")
    for case in dict.fromkeys(row.case for row in rows):
        of_case = [cells.get((case, name)) for name in contenders]
        floor = min(row.floor_us for row in of_case if row)
        shown = [f"{_number(r.median_us)} ({r.speedup:.2f})" if r else "–" for r in of_case]
        lines.append(f"| {case} | {_number(floor)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Speed-up over the baseline, a group of bars for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row.case for row in rows))
    contenders = list(dict.fromkeys(row.contender for row in rows))
    cells = {(row.case, row.contender): row for row in rows}
    figure, axes = pyplot.subplots(figsize=(max(8, 1.6 * len(cases)), 4.5), layout="constrained")
    width = 0.85 / len(contenders)
    for index, name in enumerate(contenders):
        heights = [cells[case, name].speedup if (case, name) in cells else 0.0 for case in cases]
        places = [i + (index - (len(contenders) - 1) / 2) * width for i in range(len(cases))]
        axes.bar(places, heights, width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right")
    axes.set_ylabel("speed-up over the baseline")
    axes.set_title(title)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
