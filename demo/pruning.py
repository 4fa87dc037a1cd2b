"""Half of a model's weights are zero: ``python -m demo.pruning``.

SmolLM2-135M pruned by magnitude, by Wanda and by SparseGPT, to half of all weights anywhere and to
2 of every 4, alone and with 4-bit integers in the same sweep; perplexity, size and tokens a second
of each. Half of the zeros anywhere saves nothing but what a method is judged by: the weight stays
dense. 2:4 is what a layer stores and multiplies in half the bytes, int4 + 2:4 in a fifth of 16-bit
ones. Calibrated on windows from all of the text: of one article SparseGPT learns too much, and
falls behind Wanda at 50 %. Exits with 1 if the papers' order does not show.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import pumice
from demo import compare, results
from demo.methods import UNCOMPRESSED, Method
from demo.results import Row
from pumice import _console

SIZES = {"windows": 12, "prefill": 256, "rounds": 3}
WINDOWS = 16  # that a method looks at

MAGNITUDE = Method("magnitude50", "50% by magnitude", pumice.Magnitude(0.5))
WANDA = Method("wanda50", "50% by Wanda", pumice.Wanda(0.5), WINDOWS)
SPARSEGPT = Method("sparsegpt50", "50% by SparseGPT", pumice.SparseGPT(0.5), WINDOWS)
WANDA24 = Method("wanda24", "2:4 by Wanda", pumice.Wanda(pattern="2:4"), WINDOWS)
SPARSEGPT24 = Method("sparsegpt24", "2:4 by SparseGPT", pumice.SparseGPT(pattern="2:4"), WINDOWS)
INT4_24 = Method(
    "sparsegpt24_int4",
    "int4 + 2:4 by SparseGPT",
    pumice.SparseGPT(pattern="2:4", bits=4, group_size=64, symmetric=False),
    WINDOWS,
)
METHODS = (UNCOMPRESSED, MAGNITUDE, WANDA, SPARSEGPT, WANDA24, SPARSEGPT24, INT4_24)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    with _console.progress_bars() as bars:
        sizes = {**SIZES, "windows": options.windows}
        setting = compare.load(bars, options.dtype, options.out, **sizes)
        rows, _ = compare.compare(bars, setting, METHODS)
    console = _console.output()
    console.print(results.table(rows))
    console.print(
        f"speed in tokens a second: batch 1, prompt of {setting.prefill} tokens, then "
        f"{setting.decode} generated; median of {setting.rounds - 1} interleaved rounds"
    )
    statements = verdict(rows)
    for statement, holds in statements:
        console.print(f"{'yes' if holds else 'NO '}  {statement}", style="" if holds else "red")
    return 0 if all(holds for _, holds in statements) else 1


def verdict(rows: Mapping[str, Row]) -> list[tuple[str, bool]]:
    """What the papers claim, and whether it holds here. NaN is a no."""
    ppl = {name: row.quality.perplexity for name, row in rows.items()}
    breaks = (
        f"magnitude breaks the model, Wanda and SparseGPT do not: {ppl[MAGNITUDE.name]:.0f} "
        f"against {ppl[WANDA.name]:.1f} and {ppl[SPARSEGPT.name]:.1f} at 50%",
        all(ppl[MAGNITUDE.name] > 3 * ppl[other.name] for other in (WANDA, SPARSEGPT)),
    )
    return [
        breaks,
        _better(rows, SPARSEGPT, WANDA, "50%"),
        _better(rows, SPARSEGPT24, WANDA24, "2:4"),
    ]


def _better(rows: Mapping[str, Row], one: Method, other: Method, amount: str) -> tuple[str, bool]:
    """Whether making up for the zeros pays, by more than the standard error."""
    quality, than = rows[one.name].quality, rows[other.name].quality
    ratio, error = quality.relative_to(than)
    return (
        f"at {amount} making up for the zeros pays: SparseGPT {quality.perplexity:.1f}, Wanda "
        f"{than.perplexity:.1f} ({ratio - 1:+.1%} ± {error:.1%})",
        ratio + error < 1,
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.pruning", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--windows", type=int, default=SIZES["windows"], help="evaluated, of 512 tokens each"
    )
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Nothing here is looked up on a hub; without this transformers asks one for optional files.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
