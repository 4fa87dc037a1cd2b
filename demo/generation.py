"""Batch generation beside transformers' own: ``python -m demo.generation``.

SmolLM2-135M continues pieces of Wikipedia for a number of requests whose lengths differ as those of
chats do, greedily. transformers pads them into batches that run until their longest request is
complete; pumice packs what is there into each pass and lets requests come and go over a paged
cache. The tokens must be the same: both compute the same function, but add up its products in
another order, so that where two tokens are all but equally probable either may be chosen. Each such
place is looked at: the model itself must see the two within ``TOLERANCE`` of each other.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich import box
from rich.table import Table
from torch import nn

from bench.generate import Job, Result, Tokens, measure, trace
from pumice import _console
from pumice.integrations.models import load_model
from pumice.integrations.texts import load_text

MODEL, TEXT = "smollm2-135m", "wikipedia"
NAMES = ("pumice", "transformers", "transformers, continuous")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # of logits, whose range is some dozens


@dataclass(frozen=True)
class Generation:
    """What was measured. ``gaps``: of each request whose tokens differ, see :func:`gap`."""

    results: list[Result]
    jobs: list[Job]
    batch: int
    gaps: list[float]

    def rate(self, name: str) -> float | None:
        """Tokens a second; None if that contender could not run here."""
        found = [result for result in self.results if result.name == name]
        return found[0].rate(self.jobs) if found else None


def run(
    model: nn.Module,
    ids: torch.Tensor,
    *,
    requests: int = 16,
    batch: int = 8,
    scale: float = 0.1,
    tell: Callable[[str], None] = print,
) -> Generation:
    """Everybody's time and tokens for requests with prompts from ``ids``."""
    jobs = trace(ids, requests, scale=scale)
    results = measure(model, jobs, batch, names=NAMES, rounds=1, tell=tell)
    by_name = {result.name: result.tokens for result in results}
    return Generation(results, jobs, batch, gaps(model, jobs, by_name[NAMES[0]], by_name[NAMES[1]]))


def gaps(model: nn.Module, jobs: Sequence[Job], mine: Tokens, theirs: Tokens) -> list[float]:
    """For requests with different tokens: how far apart the first two are for the model."""
    return [
        gap(model, job.prompt, a, b) for job, a, b in zip(jobs, mine, theirs, strict=True) if a != b
    ]


@torch.inference_mode()
def gap(model: nn.Module, prompt: list[int], mine: list[int], theirs: list[int]) -> float:
    """The difference of the logits of the first two tokens that differ, in a pass of their own."""
    at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
    logits = model(torch.tensor([prompt + mine[:at]])).logits[0, -1].float()
    return abs(logits[mine[at]] - logits[theirs[at]]).item()


def table(found: Generation) -> Table:
    base = found.rate("transformers") or 1.0
    shown = Table(title="batch generation", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "tokens/s", "× transformers"):
        shown.add_column(column, justify="left" if not column else "right")
    for result in found.results:
        rate = result.rate(found.jobs)
        shown.add_row(result.name, f"{rate:.1f}", f"{rate / base:.2f}")
    return shown


def statements(found: Generation, dtype: torch.dtype) -> list[tuple[str, bool]]:
    """What is claimed, and whether it shows."""
    same = len(found.jobs) - len(found.gaps)
    tokens = f"{same} of {len(found.jobs)} requests have the same tokens as with transformers"
    if found.gaps:
        tokens += (
            f"; where the others part, the model sees the two tokens {max(found.gaps):.1e} apart "
            f"(at most {TOLERANCE[dtype]:.0e})"
        )
    mine, base = found.rate("pumice") or 0.0, found.rate("transformers") or 0.0
    return [
        (tokens, all(one <= TOLERANCE[dtype] for one in found.gaps)),
        (
            f"more tokens a second than transformers' generate: {mine:.0f} and {base:.0f}",
            mine > base,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    with _console.progress_bars() as bars:

        def say(line: str) -> None:
            _console.say(bars.console, line)

        model, tokenizer = load_model(MODEL, dtype=dtype, progress=say)
        ids = torch.tensor(tokenizer(load_text(TEXT, progress=say), verbose=False).input_ids)
        with _console.step(bars, "generating"):
            found = run(model, ids, requests=options.requests, batch=options.batch, tell=say)
    console = _console.output()
    read = sum(len(job.prompt) for job in found.jobs)
    generated = sum(job.output for job in found.jobs)
    console.print(
        f"{MODEL} in {options.dtype}, {torch.get_num_threads()} threads: {len(found.jobs)} "
        f"requests, {read} tokens of prompts and {generated} generated, {options.batch} at a time"
    )
    console.print(table(found))
    verdict = statements(found, dtype)
    for statement, holds in verdict:
        console.print(f"{'yes' if holds else 'NO '}  {statement}", style="" if holds else "red")
    return 0 if all(holds for _, holds in verdict) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.generation", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="requests at a time")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's choice")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
