"""The tables of measured speeds, generated from the recorded results: all of them in
results/README.md, and of each op the cases that say most in the project's README.

Both say on which machine, when and beside which torch they were measured; a kernel whose sources
changed since (another digest than the recorded one) is named as such. `--check` fails when they are
not what the recorded results and the present sources give.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cases import BASELINE
from bench.results import RESULTS, Row, load, markdown, number, rows_of

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Headline:
    """What the README shows of an op: a contender of pumice's, and the beginnings of its cases.
    Beside it stands `rival`, or else the best that is neither pumice's nor the baseline."""

    contender: str
    cases: tuple[str, ...]
    rival: str | None = None


HEADLINES: dict[str, tuple[Headline, ...]] = {
    "int8": (Headline("pumice mixed", ("M=1", "M=16", "M=128", "M=4096")),),
    "int4": (
        Headline("pumice", ("M=1", "M=16", "M=128", "M=4096")),
        Headline("pumice int8 activations", ("M=1", "M=128")),
    ),
    "sparse24": (
        Headline("pumice", ("M=1", "M=16", "M=128", "M=4096")),
        Headline("pumice int8", ("M=1", "M=128"), "pumice int8 dense"),
        Headline("pumice int4", ("M=1", "M=128"), "pumice int4 dense"),
    ),
    "attention": (
        Headline(
            "pumice",
            (
                "B=1 H=8 S=4096 D=128 causal forward",
                "B=1 H=8 S=4096 D=128 causal window 1024",
                "B=1 H=8/2 S=1/4096 D=128 forward",
                "B=1 H=8 S=2048 D=128 causal forward+backward",
            ),
        ),
    ),
    "paged": (Headline("pumice", ("B=8 H=32/8 S=1/4096 D=128 page 16",)),),
    "cache": (Headline("pumice", ("append T=4096 H=8 D=128 rotary", "merge P=2")),),
    "sampling": (Headline("pumice", ("R=1 V=151936 greedy", "R=64 V=49152 top_k=50 top_p=0.9")),),
}


def source_digests(kind: str) -> dict[str, str]:
    """Kernels and digests from the sources (".cu" or ".cpp") in the tree: unlike the catalogue of
    the build, they are all there on a machine without nvcc."""
    spec = importlib.util.spec_from_file_location("catalogue", ROOT / "cmake" / "catalogue.py")
    assert spec is not None
    assert spec.loader is not None
    catalogue: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(catalogue)
    found: dict[str, str] = {}
    for path in sorted((ROOT / "csrc").rglob(f"*{kind}")):
        found |= catalogue.kernels_of(path, ROOT / "csrc")
    return found


def changed_kernels(recorded: dict[str, str], present: dict[str, str]) -> list[str]:
    return sorted(name for name, digest in recorded.items() if present.get(name) != digest)


def changed_since(changed: list[str]) -> list[str]:
    names = ", ".join(sorted(set(changed)))
    return [f"Changed since this was measured: {names}."] if changed else []


def all_tables(folder: Path = RESULTS) -> str:
    parts = [
        "# Recorded results",
        "From the JSON files beside this one by `python -m bench readme`. Times in microseconds, "
        "and over the baseline (torch) the speed-up. The floor is the bytes that must move over "
        "the bandwidth of memory in that run, or the operations at the machine's peak.",
    ]
    for machine, present, ops in _recorded(folder):
        parts.append(f"## {machine['name']}")
        for op, entry in ops.items():
            parts.append(
                f"**{op}**, memory bandwidth {entry['bandwidth'] / 1e9:.0f} GB/s, torch "
                f"{entry['torch']}, {entry['date']}:"
            )
            parts.append(markdown(rows_of(entry)))
            parts += changed_since(changed_kernels(entry["digests"], present))
    return "\n\n".join(parts) + "\n"


def headlines(rows: list[Row], op: str) -> Iterator[str]:
    """Lines of a table: case, floor, torch, the one beside it, pumice."""
    cells = {(row.case, row.contender): row for row in rows}
    for headline in HEADLINES.get(op, ()):
        beginnings = tuple(f"{case} " for case in headline.cases)
        name = f"{op}{headline.contender.removeprefix('pumice')}"
        for case in dict.fromkeys(row.case for row in rows):
            ours = cells.get((case, headline.contender))
            if ours is None or not case.startswith(beginnings):
                continue
            peers = [row for row in rows if row.case == case and _is_peer(row, headline.rival)]
            best = min(peers, key=lambda row: row.median_us, default=None)
            beside = f"{number(best.median_us)} {best.contender}" if best else ""
            yield (
                f"| {name}, {case} | {number(ours.floor_us)} | {number(ours.baseline_us)} "
                f"| {beside} | **{number(ours.median_us)}** ({ours.speedup:.2f}×) |"
            )


def _is_peer(row: Row, rival: str | None) -> bool:
    if rival:
        return row.contender == rival
    return row.contender != BASELINE and not row.contender.startswith("pumice")


def render(folder: Path = RESULTS) -> str:
    """What stands in the README."""
    parts: list[str] = []
    ran_on_gpu: set[str] = set()
    for machine, present, ops in _recorded(folder):
        dates = sorted({entry["date"] for entry in ops.values()})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        versions = " and ".join(sorted({entry["torch"] for entry in ops.values()}))
        parts.append(f"On {machine['name']}, torch {versions}, {when}, microseconds:")
        table = ["| | floor | torch | beside it | pumice |", "|---|---|---|---|---|"]
        changed: list[str] = []
        for op, entry in ops.items():
            table += headlines(rows_of(entry), op)
            changed += changed_kernels(entry["digests"], present)
        parts.append("\n".join(table))
        parts += changed_since(changed)
        if machine["device"] == "cuda":
            recorded = {name for entry in ops.values() for name in entry["digests"]}
            ran_on_gpu |= recorded - set(changed)
    never = [name for name in source_digests(".cu") if name not in ran_on_gpu]
    if never:
        parts.append(
            "CUDA kernels **not yet run on a GPU** in this form (checked in the emulator and by "
            "their machine code only): " + ", ".join(f"`{name}`" for name in never) + "."
        )
    return "\n\n".join(parts)


def _recorded(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, str], dict[str, Any]]]:
    """Each machine, the kernels of the present sources for its device, and its ops."""
    kinds = {"cuda": ".cu", "cpu": ".cpp"}
    for path in sorted(folder.glob("*.json")):
        machine, ops = load(path)
        yield machine, source_digests(kinds[machine["device"]]), ops


def _replace(path: Path, wanted: str, *, check: bool) -> bool:
    same = path.exists() and path.read_text() == wanted
    if not same and not check:
        path.write_text(wanted)
    return same


def rewrite(readme: Path, *, check: bool = False, folder: Path = RESULTS) -> bool:
    """Write results/README.md, and the text between the README's markers; True if nothing
    changed."""
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{render(folder)}\n{END}{after}"
    same = _replace(folder / "README.md", all_tables(folder), check=check)
    return _replace(readme, wanted, check=check) and same
