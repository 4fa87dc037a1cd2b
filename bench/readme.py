"""The README's tables of measured speeds, generated from the recorded results.

Each table says on which machine, when and beside which torch it was measured; a kernel whose
sources changed since (another digest than the recorded one) is named as such. `--check` fails when
the README is not what the recorded results and the present sources give.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from bench.results import RESULTS, load, markdown, rows_of

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


ROOT = Path(__file__).parents[1]


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


def render(folder: Path = RESULTS) -> str:
    cuda = source_digests(".cu")
    present = {"cuda": cuda, "cpu": source_digests(".cpp")}
    parts: list[str] = []
    ran_on_gpu: set[str] = set()
    for path in sorted(folder.glob("*.json")):
        machine, ops = load(path)
        for op, entry in ops.items():
            parts.append(
                f"**{op}** on {machine['name']}, memory bandwidth {entry['bandwidth'] / 1e9:.0f} "
                f"GB/s, torch {entry['torch']}, {entry['date']}:"
            )
            parts.append(markdown(rows_of(entry)))
            changed = changed_kernels(entry["digests"], present[machine["device"]])
            if changed:
                parts.append("Changed since this was measured: " + ", ".join(changed) + ".")
            if machine["device"] == "cuda":
                ran_on_gpu |= set(entry["digests"]) - set(changed)
    never = [name for name in cuda if name not in ran_on_gpu]
    if never:
        parts.append(
            "CUDA kernels **not yet run on a GPU** in this form (checked in the emulator and by "
            "their machine code only): " + ", ".join(f"`{name}`" for name in never) + "."
        )
    return "\n\n".join(parts)


def rewrite(readme: Path, *, check: bool = False) -> bool:
    """Replace the text between the markers; True if nothing changed."""
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{render()}\n{END}{after}"
    if wanted != text and not check:
        readme.write_text(wanted)
    return wanted == text
