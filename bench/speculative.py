"""Speculative decoding of a real model: ``python -m bench speculative``.

One sequence at a time, as on a laptop. For each draft: α, of the drafts that were looked at those
that were kept; tokens a pass of the target beside (1 − α^(γ+1)) / (1 − α), what they would be if
each draft were kept with probability α whatever came before; and the time of a token, without the
draft and with it, in turn. ``Σ min(p, q)`` is what α should be by theory (Leviathan et al., 2023,
section 3.2): the mean overlap of target and draft over the contexts of the text that was generated.

Time is that of decoding. The draft's reading of the prompt is a part of it, the target's is not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pumice.decode import (
    AdaptiveGamma,
    EarlyExitDraft,
    Engine,
    ModelDraft,
    NgramDraft,
    SamplingParams,
    expected_tokens,
)
from pumice.decode.acceptance import overlap
from pumice.decode.draft_compressed import compressed_copy
from pumice.decode.gamma import PacedDraft
from pumice.ops.sampling import sampling_probs
from pumice.quantize import RTN

BLOCKS = 128  # of 16 tokens, for target and draft each
Clock = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """A draft: how it is made anew for each run, and the model whose probabilities it has."""

    name: str
    make: Callable[[], PacedDraft]
    model: nn.Module | None = None


@dataclass
class Run:
    """One generation. ``outcomes``: of each pass that had drafts, how many and how many kept."""

    tokens: list[int]
    passes: int
    seconds: float
    outcomes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / (len(self.tokens) - 1)  # the first came with the prompt


@dataclass(frozen=True)
class Row:
    """A draft on a text at a temperature. NaN where there is no such number.

    ``gamma``, ``tokens_per_pass`` and ``expected`` are means over the passes that had drafts,
    ``overall`` counts all passes. The first ``same`` of ``tokens`` are those without a draft;
    where greedy ones part, the two that were chosen there are ``apart`` in their logits: rounding
    differs with the number of rows that a product has, and may decide between equals.
    """

    draft: str
    text: str
    temperature: float
    gamma: float
    acceptance: float
    overlap: float
    tokens_per_pass: float
    expected: float
    overall: float
    plain: float  # tokens a second
    speed: float
    same: int
    tokens: int
    apart: float = math.nan

    @property
    def speedup(self) -> float:
        return self.speed / self.plain


def contenders(model: nn.Module) -> list[Contender]:
    """The drafts that a model gives itself, and n-grams."""
    int4 = compressed_copy(model, RTN(bits=4, group_size=64))
    int8 = compressed_copy(model, RTN(bits=8, group_size=64))
    layers: int = model.config.num_hidden_layers  # type: ignore[union-attr,assignment]
    exit_at = 2 * layers // 3

    def by(copied: nn.Module, gamma: Callable[[], Any]) -> Callable[[], PacedDraft]:
        return lambda: ModelDraft(copied, gamma(), num_blocks=BLOCKS)

    return [
        Contender("int4 g64 copy, γ = 4", by(int4, lambda: 4), int4),
        Contender("int4 g64 copy, adaptive", by(int4, AdaptiveGamma), int4),
        Contender("int8 g64 copy, γ = 4", by(int8, lambda: 4), int8),
        Contender("int8 g64 copy, adaptive", by(int8, AdaptiveGamma), int8),
        Contender("n-grams, γ = 8", lambda: NgramDraft(8)),
        Contender("n-grams, adaptive", lambda: NgramDraft(AdaptiveGamma(12))),
        Contender(
            f"first {exit_at} of {layers} layers, γ = 2",
            lambda: EarlyExitDraft(model, exit_at, 2, num_blocks=BLOCKS),
        ),
        Contender(
            f"first {exit_at} of {layers} layers, adaptive",
            lambda: EarlyExitDraft(model, exit_at, AdaptiveGamma(4), num_blocks=BLOCKS),
        ),
    ]


def generate(
    model: nn.Module,
    prompt: list[int],
    params: SamplingParams,
    draft: PacedDraft | None,
    clock: Clock = time.perf_counter,
) -> Run:
    """One request, timed from its first token to its last."""
    outcomes: list[tuple[int, int]] = []
    if draft is not None:
        tell = draft.accepted

        def accepted(id: int, num_drafts: int, num_accepted: int) -> None:
            if num_drafts:
                outcomes.append((num_drafts, num_accepted))
            tell(id, num_drafts, num_accepted)

        draft.accepted = accepted  # type: ignore[method-assign]
    tokens: list[int] = []
    with Engine(model, num_blocks=BLOCKS, draft=draft) as engine:
        engine.add(prompt, params)
        while not tokens:
            tokens += [token for output in engine.step() for token in output.tokens]
        before, begin = engine.stats().passes, clock()
        while engine.has_work:
            tokens += [token for output in engine.step() for token in output.tokens]
        return Run(tokens, engine.stats().passes - before, clock() - begin, outcomes)


@torch.inference_mode()
def mean_overlap(
    target: nn.Module, draft: nn.Module, prompt: list[int], tokens: list[int], temperature: float
) -> float:
    """Σ min(p, q), averaged over the contexts of what was generated."""
    ids = torch.tensor([[*prompt, *tokens]])
    p, q = (
        sampling_probs(model(ids).logits[0, len(prompt) : -1], temperature=temperature)
        for model in (target, draft)
    )
    return float(overlap(p, q).mean())


@torch.inference_mode()
def logit_difference(model: nn.Module, text: list[int], first: int, second: int) -> float:
    """|l[first] − l[second]| after a text."""
    logits = model(torch.tensor([text])).logits[0, -1].float()
    return float((logits[first] - logits[second]).abs())


def measure(
    model: nn.Module,
    prompts: Mapping[str, list[int]],
    drafts: Iterable[Contender],
    *,
    temperatures: Iterable[float] = (0.0, 1.0),
    tokens: int = 96,
    rounds: int = 3,
    clock: Clock = time.perf_counter,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Every draft on every text: without it and with it in turn, ``rounds`` times; medians."""
    rows = []
    drafts = list(drafts)
    for temperature in temperatures:
        for text, prompt in prompts.items():
            params = SamplingParams(
                max_new_tokens=tokens, temperature=temperature, seed=0, ignore_eos=True
            )
            plain: list[Run] = []
            runs: dict[str, list[Run]] = {contender.name: [] for contender in drafts}
            for _ in range(rounds):
                # In turn, so that whatever else the machine does hits all of them alike.
                plain.append(generate(model, prompt, params, None, clock))
                for contender in drafts:
                    draft = contender.make()
                    runs[contender.name].append(generate(model, prompt, params, draft, clock))
                progress(f"{text}, temperature {temperature:g}: {len(plain)} of {rounds} rounds")
            for contender in drafts:
                row = _row(contender, text, temperature, plain, runs[contender.name])
                ids = runs[contender.name][-1].tokens
                if contender.model is not None:
                    shared = mean_overlap(model, contender.model, prompt, ids, temperature)
                    row = replace(row, overlap=shared)
                if temperature == 0 and row.same < row.tokens:
                    pair = plain[-1].tokens[row.same], ids[row.same]
                    apart = logit_difference(model, prompt + ids[: row.same], *pair)
                    row = replace(row, apart=apart)
                rows.append(row)
    return rows


def _row(
    contender: Contender, text: str, temperature: float, plain: list[Run], runs: list[Run]
) -> Row:
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    accepted = sum(kept for _, kept in outcomes)
    tested = sum(kept + (kept < drafts) for drafts, kept in outcomes)
    alpha = accepted / tested if tested else math.nan
    same = [a == b for a, b in zip(runs[-1].tokens, plain[-1].tokens, strict=True)]

    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values) if outcomes else math.nan

    return Row(
        draft=contender.name,
        text=text,
        temperature=temperature,
        gamma=mean(drafts for drafts, _ in outcomes),
        acceptance=alpha,
        overlap=math.nan,
        tokens_per_pass=mean(kept + 1 for _, kept in outcomes),
        expected=mean(expected_tokens(alpha, drafts) for drafts, _ in outcomes),
        overall=sum(len(run.tokens) - 1 for run in runs) / sum(run.passes for run in runs),
        plain=1 / statistics.median(run.seconds_per_token for run in plain),
        speed=1 / statistics.median(run.seconds_per_token for run in runs),
        same=same.index(False) if False in same else len(same),
        tokens=len(same),
    )


def run(
    dtype: str,
    tokens: int,
    rounds: int,
    only: str,
    processor_time: bool,
    progress: Callable[[str], None],
) -> list[Row]:
    """The whole table, on SmolLM2-135M."""
    from pumice.integrations.models import load_model

    model, tokenizer = load_model("smollm2-135m", dtype=getattr(torch, dtype), progress=progress)
    drafts = [contender for contender in contenders(model) if only in contender.name]
    if not drafts:
        raise ValueError(f"no draft's name holds {only!r}")
    return measure(
        model,
        sample_prompts(tokenizer),
        drafts,
        tokens=tokens,
        rounds=rounds,
        clock=time.process_time if processor_time else time.perf_counter,
        progress=progress,
    )


def markdown(rows: Iterable[Row]) -> str:
    """One line a row; speeds in tokens a second."""
    lines = [
        "| text | T | draft | γ | α | Σ min(p, q) | tokens/pass | by α | of all | plain/s "
        "| with draft/s | speed-up |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        numbers = (row.gamma, row.acceptance, row.overlap)
        passes = (row.tokens_per_pass, row.expected, row.overall)
        lines.append(
            f"| {row.text} | {row.temperature:g} | {row.draft} | {_cell(numbers[0], 1)} "
            f"| {_cell(numbers[1], 3)} | {_cell(numbers[2], 3)} "
            + "".join(f"| {_cell(number, 2)} " for number in passes)
            + f"| {row.plain:.1f} | {row.speed:.1f} | ×{row.speedup:.2f} |"
        )
    return "\n".join(lines)


def _cell(number: float, digits: int) -> str:
    return "–" if math.isnan(number) else f"{number:.{digits}f}"


def sample_prompts(tokenizer: Any) -> dict[str, list[int]]:
    """Free text to go on with, and a text to be written out again with small changes."""
    from pumice.integrations.texts import load_text

    article = load_text("wikipedia")[3000:4200]
    code = "Add docstrings to this Python class and write it out again:\n\n```python\n"
    return {
        "article": tokenizer(article).input_ids[:200],
        "edit": tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{code}{CLASS}```"}],
            add_generation_prompt=True,
            return_dict=False,
        ),
    }


CLASS = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def is_empty(self):
        return not self.items
"""
