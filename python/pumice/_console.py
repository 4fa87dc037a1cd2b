"""What the command line and the demo share: consoles, progress bars, the report in short."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pumice.report import LayerReport, Report


def output() -> Console:
    """Results. Made anew for each use, so that it writes to what sys.stdout is by then."""
    return Console(file=sys.stdout, highlight=False)


def messages() -> Console:
    """Everything that is not the result."""
    return Console(file=sys.stderr, highlight=False)


def say(console: Console, line: str, *, style: str = "") -> None:
    """One line as it is: brackets are no markup, and it is not broken at the console's width."""
    console.print(Text(line), style=style, soft_wrap=True)


def progress_bars() -> Progress:
    """Bars on standard error; lines printed through ``.console`` appear above them."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=messages(),
    )


@contextmanager
def step(bars: Progress, description: str) -> Iterator[Callable[[int, int], None]]:
    """One bar, moved by calling what is yielded with (done, total).

    Warnings on the way are a line each above it, without the place in the code.
    """
    task = bars.add_task(description, total=None)

    def advance(done: int, total: int) -> None:
        bars.update(task, completed=done, total=total)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        say(bars.console, f"warning: {' '.join(str(message).split())}", style="yellow")

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield advance
    finally:
        bars.stop_task(task)


@dataclass(frozen=True)
class Group:
    """Layers that play the same part in every block, such as all the ``q_proj``."""

    name: str
    layers: list[LayerReport]

    @property
    def outlier_fraction(self) -> float | None:
        known = [x.outlier_fraction for x in self.layers if x.outlier_fraction is not None]
        return sum(known) / len(known) if known else None

    @property
    def sparsity(self) -> float | None:
        """The share of zeros among all weights of the pruned layers."""
        known = [
            (x.sparsity, x.in_features * x.out_features)
            for x in self.layers
            if x.sparsity is not None
        ]
        weights = sum(size for _, size in known)
        return sum(share * size for share, size in known) / weights if known else None

    @property
    def worst(self) -> LayerReport | None:
        known = [x for x in self.layers if x.relative_error is not None]
        return max(known, key=lambda layer: layer.relative_error or 0.0, default=None)


def groups(report: Report) -> list[Group]:
    """The report's layers by the last part of their names, in order of appearance."""
    found: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        found.setdefault(layer.name.rpartition(".")[2] or "(the model)", []).append(layer)
    return [Group(name, layers) for name, layers in found.items()]


def report_table(report: Report, title: str) -> Table:
    """A report of hundreds of layers in a few lines: one for each part that layers play."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layers", no_wrap=True)
    table.add_column("in → out", justify="right", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    measured = any(layer.relative_error is not None for layer in report.layers)
    outliers = any(layer.outlier_fraction is not None for layer in report.layers)
    pruned = any(layer.sparsity is not None for layer in report.layers)
    if pruned:
        table.add_column("zeros", justify="right", no_wrap=True)
    if outliers:
        table.add_column("outlier columns", justify="right")
    if measured:
        table.add_column("largest error", justify="right", no_wrap=True)
    for group in groups(report):
        shapes = {(layer.in_features, layer.out_features) for layer in group.layers}
        before = sum(layer.bytes_before for layer in group.layers) / 1e6
        after = sum(layer.bytes_after for layer in group.layers) / 1e6
        cells = [
            f"{len(group.layers)} × {group.name}",
            " → ".join(map(str, shapes.pop())) if len(shapes) == 1 else "several",
            f"{before:.1f} → {after:.1f}",
        ]
        if pruned:
            share = group.sparsity
            cells.append("" if share is None else f"{share:.1%}")
        if outliers:
            fraction = group.outlier_fraction
            cells.append("" if fraction is None else f"{fraction:.2%}")
        if measured:
            worst = group.worst
            cells.append("" if worst is None else f"{worst.relative_error:.2%} {_place(worst)}")
        table.add_row(*cells)
    return table


def _place(layer: LayerReport) -> str:
    """Which of its group: the block's number, the one numeric part that such names have."""
    numbers = [part for part in layer.name.split(".") if part.isdigit()]
    return f"(block {'.'.join(numbers)})" if numbers else ""
