"""Compress SmolLM2-135M in several ways and measure quality, size and speed of each.

The uncompressed model is float32 by default: that is what its weights become when the published
4-bit file is dequantized, and what every CPU multiplies well. ``--dtype bfloat16`` runs the whole
table in 16 bit, which is the fairer rival for speed where the CPU has bfloat16 instructions.
Models that took a calibration are kept beside the results and loaded the next time.
Exits with 1 if what LLM.int8()'s paper claims does not show.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

import pumice
from demo import attention, picture, results
from demo.methods import LLM_INT8, METHODS, UNCOMPRESSED, Method
from pumice import _console
from pumice.evaluate import model_size, perplexity, throughput
from pumice.integrations.models import load_model
from pumice.integrations.texts import load_text

MODEL = "smollm2-135m"
TEXT = "wikipedia"
CONTEXT = 512
PREFILL, DECODE = 512, 24  # tokens
ROUNDS = 4  # of speed; the first one warms up and is thrown away


def main() -> int:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    with _console.progress_bars() as bars:
        rows, report, attention_line = measure(bars, options)
    quality = rows[LLM_INT8.name].quality
    setting = {
        "model": MODEL,
        "dtype": options.dtype,
        "text": TEXT,
        "context": quality.context,
        "windows": len(quality.window_nll),
        "tokens": quality.tokens,
        "cpu": pumice.doctor().cpu,
        "torch": torch.__version__,
    }
    console = _console.output()
    console.print(_console.report_table(report, "LLM.int8(), layer by layer"))
    console.print(
        f"SmolLM2-135M in {options.dtype}, {setting['cpu']['model']} "
        f"({setting['cpu']['instruction_set']}), {torch.get_num_threads()} threads\n"
        f"perplexity: Wikipedia excerpt, {setting['windows']} windows of {CONTEXT} tokens, "
        f"{quality.tokens} predicted; ± is the standard error of the paired windows\n"
        f"speed in tokens a second: batch 1, prompt of {PREFILL} tokens, then {DECODE} generated; "
        f"median of {ROUNDS - 1} interleaved rounds"
    )
    console.print(results.table(rows))
    console.print(attention_line)
    results.store(options.out / "results.json", rows, setting)
    caption = f"SmolLM2-135M ({options.dtype}), {quality.tokens} tokens of Wikipedia"
    picture.draw(options.out / "perplexity.png", rows, caption)
    console.print(f"written: {options.out / 'results.json'}, {options.out / 'perplexity.png'}")
    verdict = results.verdict(rows)
    for statement, holds in verdict:
        console.print(f"{'yes' if holds else 'NO '}  {statement}", style="" if holds else "red")
    return 0 if all(holds for _, holds in verdict) else 1


def measure(
    bars: Progress, options: argparse.Namespace
) -> tuple[dict[str, results.Row], pumice.Report, str]:
    """All rows of the table, the report of LLM.int8(), and the line on attention."""

    def say(line: str) -> None:
        _console.say(bars.console, line)

    model, tokenizer = load_model(MODEL, dtype=getattr(torch, options.dtype), progress=say)
    evaluation = _token_ids(tokenizer, load_text(TEXT, progress=say))
    calibration = _token_ids(tokenizer, load_text(TEXT, split="calibration", progress=say))
    kept = options.out / "models" / options.dtype
    models = {m.name: _compressed(bars, model, m, calibration, kept) for m in METHODS}
    rows = {}
    for method in METHODS:
        compressed = models[method.name]
        with _console.step(bars, f"perplexity: {method.label}") as advance:
            quality = perplexity(
                compressed, evaluation, context=CONTEXT, windows=options.windows, on_window=advance
            )
        rows[method.name] = results.Row(method, quality, model_size(compressed))
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
    with _console.step(bars, "attention by pumice"):
        base = rows[UNCOMPRESSED.name]
        attention_line = attention.line(model, evaluation, base, CONTEXT, options.windows)
    return rows, pumice.report(models[LLM_INT8.name]), attention_line


def _compressed(
    bars: Progress,
    model: torch.nn.Module,
    method: Method,
    calibration: torch.Tensor,
    kept: Path,
) -> torch.nn.Module:
    if method.recipe is None:
        return model
    folder = kept / f"{method.name}-{method.digest}"
    if method.calibration and folder.is_dir():
        return pumice.load(folder)
    # LLM.int8() needs no calibration; two windows show what it does to each layer.
    count = 2 if method is LLM_INT8 else method.calibration
    windows = list(calibration[: count * CONTEXT].view(count, 1, CONTEXT))
    with _console.step(bars, f"compressing: {method.label}") as advance:
        compressed = pumice.compress(
            model,
            method.recipe,
            windows or None,
            progress=lambda done, total, name: advance(done, total),
        )
    if method.calibration:
        pumice.save(compressed, folder)
    return compressed


def _token_ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, verbose=False).input_ids)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--windows", type=int, default=12, help="evaluated, of 512 tokens each")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    return parser.parse_args()


if __name__ == "__main__":
    # Nothing here is looked up on a hub; without this transformers asks one for optional files.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
