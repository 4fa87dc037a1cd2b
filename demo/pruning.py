"""Half of a model's weights are zero: ``python -m demo.pruning``.

SmolLM2-135M pruned by magnitude, by Wanda and by SparseGPT, to half of all weights anywhere and to
2 of every 4, alone and with 4-bit integers in the same sweep; perplexity, size and tokens a second
of each. Half of the zeros anywhere saves nothing but what a method is judged by: the weight stays
dense. 2:4 is what a layer stores and multiplies in half the bytes, int4 + 2:4 in a sixth of 16-bit
ones. Exits with 1 if the papers' order does not show.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

import pumice
from demo import results
from demo.methods import UNCOMPRESSED, Method
from demo.results import Row
from pumice import _console
from pumice.evaluate import model_size, perplexity, throughput
from pumice.integrations.models import load_model
from pumice.integrations.texts import load_text

MODEL, TEXT = "smollm2-135m", "wikipedia"
CONTEXT = 512
PREFILL, DECODE = 256, 24  # tokens
ROUNDS = 3  # of speed; the first one warms up and is thrown away
WINDOWS = 8  # that a method looks at

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
        rows = measure(bars, options)
    console = _console.output()
    console.print(results.table(rows))
    console.print(
        f"speed in tokens a second: batch 1, prompt of {PREFILL} tokens, then {DECODE} generated; "
        f"median of {ROUNDS - 1} interleaved rounds"
    )
    statements = verdict(rows)
    for statement, holds in statements:
        console.print(f"{'yes' if holds else 'NO '}  {statement}", style="" if holds else "red")
    return 0 if all(holds for _, holds in statements) else 1


def measure(bars: Progress, options: argparse.Namespace) -> dict[str, Row]:
    """All rows of the table."""

    def say(line: str) -> None:
        _console.say(bars.console, line)

    model, tokenizer = load_model(MODEL, dtype=getattr(torch, options.dtype), progress=say)
    evaluation = _token_ids(tokenizer, load_text(TEXT, progress=say))
    calibration = _token_ids(tokenizer, load_text(TEXT, split="calibration", progress=say))
    kept = options.out / "models" / options.dtype
    models = {m.name: _pruned(bars, model, m, calibration, kept) for m in METHODS}
    rows = {}
    for method in METHODS:
        with _console.step(bars, f"perplexity: {method.label}") as advance:
            quality = perplexity(
                models[method.name],
                evaluation,
                context=CONTEXT,
                windows=options.windows,
                on_window=advance,
            )
        rows[method.name] = Row(method, quality, model_size(models[method.name]))
    with _console.step(bars, "speed, all methods in turn") as advance:
        # In turn, so that whatever else the machine does meanwhile hits every method alike.
        for done in range(ROUNDS * len(rows)):
            row = list(rows.values())[done % len(rows)]
            speed = throughput(
                models[row.method.name],
                evaluation,
                prefill=PREFILL,
                decode=DECODE,
                repeats=1,
                warmup=0,
            )
            if done >= len(rows):
                row.rounds.append(speed)
            advance(done + 1, ROUNDS * len(rows))
    return rows


def verdict(rows: Mapping[str, Row]) -> list[tuple[str, bool]]:
    """What the papers claim, and whether it holds here. NaN is a no."""
    ppl = {name: row.quality.perplexity for name, row in rows.items()}
    return [
        (
            f"magnitude breaks the model, Wanda and SparseGPT do not: {ppl[MAGNITUDE.name]:.0f} "
            f"against {ppl[WANDA.name]:.1f} and {ppl[SPARSEGPT.name]:.1f} at 50%",
            ppl[MAGNITUDE.name] > 3 * max(ppl[WANDA.name], ppl[SPARSEGPT.name]),
        ),
        (
            f"at 2:4 making up for the zeros pays: SparseGPT {ppl[SPARSEGPT24.name]:.1f}, Wanda "
            f"{ppl[WANDA24.name]:.1f}",
            ppl[SPARSEGPT24.name] < ppl[WANDA24.name],
        ),
    ]


def _pruned(
    bars: Progress, model: nn.Module, method: Method, calibration: Tensor, kept: Path
) -> nn.Module:
    if method.recipe is None:
        return model
    folder = kept / f"{method.name}-{method.digest}"
    if method.calibration and folder.is_dir():
        return pumice.load(folder)
    windows = list(calibration[: method.calibration * CONTEXT].view(-1, 1, CONTEXT))
    with _console.step(bars, f"pruning: {method.label}") as advance:
        pruned = pumice.compress(
            model,
            method.recipe,
            windows or None,
            progress=lambda done, total, name: advance(done, total),
        )
    if method.calibration:
        pumice.save(pruned, folder)
    return pruned


def _token_ids(tokenizer: object, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False).input_ids)  # type: ignore[operator]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.pruning", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--windows", type=int, default=8, help="evaluated, of 512 tokens each")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Nothing here is looked up on a hub; without this transformers asks one for optional files.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
