"""Generating for many requests at once: tokens a second, beside transformers.

All contenders serve the same requests, greedily, at most ``batch`` of them at a time, each to a
length of its own (end-of-sequence tokens do not count, so that all do the same work):

    pumice                    continuous batching on the paged cache: ``pumice.generate``
    pumice, batch_invariant   the same with passes of one size: the price of the same bits
    transformers              ``model.generate`` on batches in the order of arrival, padded on the
                              left, each of which runs until its longest is complete
    transformers, sorted      the same on batches of like output length, as if it were known
    transformers, continuous  its own continuous batching

Only tokens that were asked for count. Lengths are log-normal, as those of chats (see
:mod:`bench.block_manager`), scaled down; prompts are random tokens, or pieces of a text.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import pumice
from bench.block_manager import chat_trace
from pumice.decode import SamplingParams

Tokens = list[list[int]]


@dataclass(frozen=True)
class Job:
    """A prompt, and how many tokens are to follow it."""

    prompt: list[int]
    output: int


@dataclass
class Result:
    """One contender: seconds of each round, and what it generated in the last."""

    name: str
    seconds: list[float] = field(default_factory=list)
    tokens: Tokens = field(default_factory=list)

    def rate(self, jobs: Sequence[Job]) -> float:
        """Tokens asked for a second, the median over the rounds."""
        return sum(job.output for job in jobs) / statistics.median(self.seconds)

    def agreement(self, other: Tokens) -> tuple[int, float]:
        """Requests with wholly the same tokens, and the mean part before the first difference."""
        same, parts = 0, []
        for mine, theirs in zip(self.tokens, other, strict=True):
            pairs = enumerate(zip(mine, theirs, strict=True))
            first = next((i for i, (a, b) in pairs if a != b), len(mine))
            same += mine == theirs
            parts.append(first / len(mine))
        return same, statistics.fmean(parts)


def trace(ids: Tensor, requests: int, *, scale: float = 0.15, seed: int = 0) -> list[Job]:
    """Requests with pieces of ``ids`` as prompts; lengths are those of chats times ``scale``."""
    jobs = []
    generator = torch.Generator().manual_seed(seed)
    for request in chat_trace(requests, seed):
        prompt, output = (max(4, int(n * scale)) for n in (request.prompt, request.output))
        begin = int(torch.randint(0, len(ids) - prompt, (), generator=generator))
        jobs.append(Job(ids[begin : begin + prompt].tolist(), output))
    return jobs


# The contenders: a model, jobs, the most at a time; the tokens of each.


def by_pumice(model: nn.Module, jobs: Sequence[Job], batch: int, **options: Any) -> Tokens:
    params = [SamplingParams(job.output, ignore_eos=True) for job in jobs]
    prompts = [job.prompt for job in jobs]
    done = pumice.generate(model, prompts, params=params, max_sequences=batch, **options)
    return [one.tokens for one in done]


def by_pumice_invariant(model: nn.Module, jobs: Sequence[Job], batch: int) -> Tokens:
    # Passes of twice as many tokens as sequences: while half of them generate, others read.
    return by_pumice(model, jobs, batch, batch_invariant=True, max_batch_tokens=2 * batch)


def by_transformers(model: Any, jobs: Sequence[Job], batch: int) -> Tokens:
    """Static batches, padded on the left."""
    tokens: Tokens = []
    for begin in range(0, len(jobs), batch):
        now = jobs[begin : begin + batch]
        width = max(len(job.prompt) for job in now)
        ids = torch.zeros(len(now), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, job in enumerate(now):
            ids[row, width - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[row, width - len(job.prompt) :] = 1
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=_greedy(max(job.output for job in now)),
        )
        tokens += [
            row[width : width + job.output].tolist() for row, job in zip(out, now, strict=True)
        ]
    return tokens


def by_transformers_sorted(model: Any, jobs: Sequence[Job], batch: int) -> Tokens:
    order = sorted(range(len(jobs)), key=lambda i: jobs[i].output)
    tokens = by_transformers(model, [jobs[i] for i in order], batch)
    return [tokens[order.index(i)] for i in range(len(jobs))]


def by_transformers_continuous(model: Any, jobs: Sequence[Job], batch: int) -> Tokens:
    """Raises RuntimeError where this version of transformers cannot, or its thread died."""
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError as error:
        raise RuntimeError("this version of transformers has no such API") from error
    longest = max(len(job.prompt) + job.output for job in jobs)
    page = 32
    config = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=batch * (-(-longest // page) + 1),
        max_batch_tokens=512,
        max_requests_per_batch=batch,
        use_cuda_graph=False,
        allow_block_sharing=False,
    )
    before = model.config._attn_implementation
    found: dict[str, list[int]] = {}
    try:
        with model.continuous_batching_context_manager(
            generation_config=_greedy(max(job.output for job in jobs)),
            continuous_batching_config=config,
            block=True,
            timeout=5,
        ) as manager:
            names = [manager.add_request(job.prompt, max_new_tokens=job.output) for job in jobs]
            while len(found) < len(jobs):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("its thread ended before the requests did")
                if result is not None and result.is_finished():
                    found[result.request_id] = list(result.generated_tokens)
    finally:
        model.set_attn_implementation(before)
    return [found[name] for name in names]


Contender = Callable[[Any, Sequence[Job], int], Tokens]

CONTENDERS: dict[str, Contender] = {
    "pumice": by_pumice,
    "pumice, batch_invariant": by_pumice_invariant,
    "transformers": by_transformers,
    "transformers, sorted": by_transformers_sorted,
    "transformers, continuous": by_transformers_continuous,
}


def _greedy(tokens: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0, use_cache=True
    )


def measure(
    model: nn.Module,
    jobs: Sequence[Job],
    batch: int,
    *,
    names: Sequence[str] = tuple(CONTENDERS),
    rounds: int = 2,
    tell: Callable[[str], None] = print,
) -> list[Result]:
    """The contenders in turn, after a round of few tokens each; those that cannot are left out."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns that no token of the vocabulary ends a text
    results = {}
    short = [Job(job.prompt[:8], 2) for job in jobs[:2]]
    for name in names:
        try:
            CONTENDERS[name](model, short, batch)
            results[name] = Result(name)
        except RuntimeError as error:
            tell(f"{name} skipped: {error}")
    for _ in range(rounds):
        for name, result in results.items():
            gc.collect()
            start = time.perf_counter()
            result.tokens = CONTENDERS[name](model, jobs, batch)
            result.seconds.append(time.perf_counter() - start)
    return list(results.values())


def markdown(results: Sequence[Result], jobs: Sequence[Job], batch: int) -> str:
    """A table; tokens are compared with transformers' static batches, where these took part."""
    base = next((one for one in results if one.name == "transformers"), results[0])
    lengths = [len(job.prompt) for job in jobs], [job.output for job in jobs]
    lines = [
        f"{len(jobs)} requests, prompts of {_spread(lengths[0])} tokens, outputs of "
        f"{_spread(lengths[1])}, {batch} at a time",
        "",
        f"| | tokens/s | × {base.name} | same as {base.name} (to the first difference) |",
        "|---|---|---|---|",
    ]
    for one in results:
        rate = one.rate(jobs)
        same, part = one.agreement(base.tokens)
        lines.append(
            f"| {one.name} | {rate:.1f} | {rate / base.rate(jobs):.2f} | {same} of {len(jobs)} "
            f"({part:.0%}) |"
        )
    return "\n".join(lines)


def _spread(numbers: Sequence[int]) -> str:
    return f"{min(numbers)} … {statistics.median(numbers):.0f} … {max(numbers)}"


def tiny_model() -> nn.Module:
    """Random and small: what shows is what each step costs beside the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


def tables(
    model_name: str, dtype: torch.dtype, requests: int, batch: int, tell: Callable[[str], None]
) -> str:
    """The tiny model and a real one ("" for none), in Markdown."""
    tiny = tiny_model()
    jobs = trace(torch.randint(0, 2048, (20_000,)), requests)
    parts = ["A tiny model", "", markdown(measure(tiny, jobs, batch, tell=tell), jobs, batch)]
    if model_name:
        from pumice.integrations.models import load_model
        from pumice.integrations.texts import load_text

        model, tokenizer = load_model(model_name, dtype=dtype)
        ids = torch.tensor(tokenizer(load_text("wikipedia"), verbose=False).input_ids)
        jobs = trace(ids, requests)
        results = measure(model, jobs, batch, tell=tell)
        name = f"{model_name}, {str(dtype).removeprefix('torch.')}"
        parts += ["", name, "", markdown(results, jobs, batch)]
    return "\n".join(parts)
