"""The same text in fewer passes: ``python -m demo.speculative``.

SmolLM2-135M generates with drafts of its own making: its copy in 4 bits, n-grams of the text, its
first layers. Each pass of the model checks what the draft proposed, so the text is the model's own
(greedily, token for token); what is gained is time, where a draft is cheap and often right. It is
lost where it is not: γ is chosen by what is measured, and should then come down to none.
Exits with 1 if a greedy text differs from that without a draft by more than rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import nn

from bench.speculative import Row, contenders, measure, sample_prompts
from pumice import _console
from pumice.integrations.models import load_model

SHOWN = ("int4 g64 copy, adaptive", "n-grams, adaptive", "layers, adaptive")


def rows(
    model: nn.Module,
    tokenizer: Any,
    *,
    tokens: int = 64,
    rounds: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Three drafts on two texts, greedy and at temperature 1; about a minute on two idle cores."""
    drafts = [one for one in contenders(model) if one.name.endswith(SHOWN)]
    return measure(
        model, sample_prompts(tokenizer), drafts, tokens=tokens, rounds=rounds, progress=say
    )


def table(rows: Sequence[Row]) -> Table:
    """In 80 columns."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("text", "T", "draft"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("kept", "per pass", "by α", "plain/s", "draft/s"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        grid.add_row(
            row.text,
            f"{row.temperature:g}",
            row.draft.removesuffix(", adaptive").removeprefix("first "),
            f"{row.acceptance:.0%}" if row.acceptance == row.acceptance else "–",
            f"{row.tokens_per_pass:.2f}" if row.expected == row.expected else "–",
            f"{row.expected:.2f}" if row.expected == row.expected else "–",
            f"{row.plain:.1f}",
            f"{row.speed:.1f} ×{row.speedup:.2f}",
        )
    return grid


def verdict(rows: Sequence[Row], tolerance: float) -> list[tuple[str, bool]]:
    """Greedy texts are those without a draft, up to choices between logits as good as equal."""
    return [
        (
            f"{row.text}, {row.draft}: the same {row.same} of {row.tokens} tokens"
            + ("" if row.same == row.tokens else f", then logits {row.apart:.2g} apart"),
            row.same == row.tokens or row.apart <= tolerance,
        )
        for row in rows
        if row.temperature == 0
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = _console.output()
    with _console.progress_bars() as bars:
        say = lambda line: _console.say(bars.console, line)  # noqa: E731
        model, tokenizer = load_model(
            "smollm2-135m", dtype=getattr(torch, options.dtype), progress=say
        )
        with _console.step(bars, "speculative decoding"):
            measured = rows(model, tokenizer, tokens=options.tokens, rounds=options.rounds, say=say)
    console.print(
        f"SmolLM2-135M in {options.dtype}, {torch.get_num_threads()} threads, one sequence, "
        f"{options.tokens} tokens; γ adapts to acceptance and time\n"
        "kept: of the drafts looked at; per pass: tokens, where there were drafts, beside\n"
        "(1 − α^(γ+1)) / (1 − α); tokens a second without the draft and with it"
    )
    console.print(table(measured))
    # Rounding of logits of about 30, through all the layers.
    holds = verdict(measured, 30 * 8 * torch.finfo(getattr(torch, options.dtype)).eps)
    for statement, true in holds:
        console.print(f"{'yes' if true else 'NO '}  {statement}", style="" if true else "red")
    return 0 if all(true for _, true in holds) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.speculative", description=__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
