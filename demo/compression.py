"""A model in fewer bits: ``python -m demo.compression``.

SmolLM2-135M is quantized in several ways; quality, size and speed of each.

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
from collections.abc import Sequence
from pathlib import Path

import torch

import pumice
from demo import attention, compare, picture, results
from demo.methods import LLM_INT8, METHODS, UNCOMPRESSED
from pumice import _console

SIZES = {"context": 512, "prefill": 512, "decode": 24, "rounds": 4}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    with _console.progress_bars() as bars:
        setting = compare.load(bars, options.dtype, options.out, windows=options.windows, **SIZES)
        rows, models = compare.compare(bars, setting, METHODS)
        report = pumice.report(models[LLM_INT8.name])
        del models  # the memory of all but the first
        with _console.step(bars, "attention by pumice"):
            attention_line = attention.line(setting, rows[UNCOMPRESSED.name])
    quality = rows[LLM_INT8.name].quality
    described = {
        "model": compare.MODEL,
        "dtype": options.dtype,
        "text": compare.TEXT,
        "context": quality.context,
        "windows": len(quality.window_nll),
        "tokens": quality.tokens,
        "cpu": pumice.doctor().cpu,
        "torch": torch.__version__,
    }
    console = _console.output()
    console.print(_console.report_table(report, "LLM.int8(), layer by layer"))
    console.print(
        f"SmolLM2-135M in {options.dtype}, {described['cpu']['model']} "
        f"({described['cpu']['instruction_set']}), {torch.get_num_threads()} threads\n"
        f"perplexity: Wikipedia excerpt, {described['windows']} windows of {setting.context} "
        f"tokens, {quality.tokens} predicted; ± is the standard error of the paired windows\n"
        f"speed in tokens a second: batch 1, prompt of {setting.prefill} tokens, then "
        f"{setting.decode} generated; median of {setting.rounds - 1} interleaved rounds"
    )
    console.print(results.table(rows))
    console.print(attention_line)
    results.store(options.out / "results.json", rows, described)
    caption = f"SmolLM2-135M ({options.dtype}), {quality.tokens} tokens of Wikipedia"
    picture.draw(options.out / "perplexity.png", rows, caption)
    console.print(f"written: {options.out / 'results.json'}, {options.out / 'perplexity.png'}")
    verdict = results.verdict(rows)
    for statement, holds in verdict:
        console.print(f"{'yes' if holds else 'NO '}  {statement}", style="" if holds else "red")
    return 0 if all(holds for _, holds in verdict) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.compression", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="default: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--windows", type=int, default=12, help="evaluated, of 512 tokens each")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Nothing here is looked up on a hub; without this transformers asks one for optional files.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
