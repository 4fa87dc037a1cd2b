"""One model compressed in several ways: quality, size and speed of each, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

import pumice
from demo.methods import Method
from demo.results import Row
from pumice import _console
from pumice.evaluate import model_size, perplexity, throughput
from pumice.integrations.models import load_model
from pumice.integrations.texts import load_text

MODEL, TEXT = "smollm2-135m", "wikipedia"


@dataclass(frozen=True)
class Setting:
    """What is compared, on which tokens.

    ``kept``: folder for models that took a calibration; they are loaded the next time.
    ``context``: tokens of a window. ``windows``: so many are evaluated. ``prefill``, ``decode``:
    tokens of a round of speed, of which there are ``rounds``; the first warms up and is dropped.
    """

    model: nn.Module
    tokenizer: Any
    evaluation: Tensor
    calibration: Tensor
    kept: Path
    context: int = 512
    windows: int = 12
    prefill: int = 512
    decode: int = 24
    rounds: int = 4


def load(bars: Progress, dtype: str, out: Path, **sizes: int) -> Setting:
    """The real model and the real text."""

    def say(line: str) -> None:
        _console.say(bars.console, line)

    model, tokenizer = load_model(MODEL, dtype=getattr(torch, dtype), progress=say)

    def token_ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, verbose=False).input_ids)

    return Setting(
        model=model,
        tokenizer=tokenizer,
        evaluation=token_ids(load_text(TEXT, progress=say)),
        calibration=token_ids(load_text(TEXT, split="calibration", progress=say)),
        kept=out / "models" / f"{MODEL}-{dtype}",
        **sizes,
    )


def compare(
    bars: Progress, setting: Setting, methods: Sequence[Method]
) -> tuple[dict[str, Row], dict[str, nn.Module]]:
    """A row and the model of each method, by its name."""
    models = {method.name: _compressed(bars, setting, method) for method in methods}
    rows = {}
    for method in methods:
        with _console.step(bars, f"perplexity: {method.label}") as advance:
            quality = perplexity(
                models[method.name],
                setting.evaluation,
                context=setting.context,
                windows=setting.windows,
                on_window=advance,
            )
        rows[method.name] = Row(method, quality, model_size(models[method.name]))
    with _console.step(bars, "speed, all methods in turn") as advance:
        # In turn, so that whatever else the machine does meanwhile hits every method alike.
        for done in range(setting.rounds * len(rows)):
            row = list(rows.values())[done % len(rows)]
            speed = throughput(
                models[row.method.name],
                setting.evaluation,
                prefill=setting.prefill,
                decode=setting.decode,
                repeats=1,
                warmup=0,
            )
            if done >= len(rows):
                row.rounds.append(speed)
            advance(done + 1, setting.rounds * len(rows))
    return rows, models


def _compressed(bars: Progress, setting: Setting, method: Method) -> nn.Module:
    if method.recipe is None:
        return setting.model
    windows = spread(setting.calibration, method.calibration + method.observed, setting.context)
    folder = setting.kept / f"{method.name}-{method.digest(windows)}"
    if method.calibration and folder.is_dir():
        return pumice.load(folder)
    with _console.step(bars, f"compressing: {method.label}") as advance:
        compressed = pumice.compress(
            setting.model,
            method.recipe,
            windows or None,
            progress=lambda done, total, name: advance(done, total),
        )
    if method.calibration:
        pumice.save(compressed, folder)
    return compressed


def spread(ids: Tensor, count: int, context: int) -> list[Tensor]:
    """Windows [1, context] spread evenly over a text: its beginning is one article alone."""
    available = len(ids) // context
    if count > available:
        raise ValueError(f"{len(ids)} tokens give {available} windows of {context}, not {count}")
    starts = [index * available // count * context for index in range(count)]
    return [ids[None, start : start + context] for start in starts]
