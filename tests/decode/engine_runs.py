"""Runs of an engine for the tests: requests in, what came of each out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pumice.decode import Engine, SamplingParams

VOCABULARY = 61


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, VOCABULARY), k=length)


PROMPTS = [prompt_of(n, seed=n) for n in (1, 2, 7, 19, 30, 4, 11, 3)]


def engine_of(model: nn.Module, **options: Any) -> Engine:
    return Engine(model, **{"num_blocks": 200, "block_size": 4, **options})


def greedy(count: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(count, ignore_eos=True, **options)


def random_params(count: int = 12, seed: int = 0, **options: Any) -> SamplingParams:
    return SamplingParams(count, temperature=1.0, seed=seed, ignore_eos=True, **options)


def run(
    engine: Engine, prompts: Sequence[Any], params: Any, *, gap: int = 0
) -> list[dict[int, list[int]]]:
    """For each prompt the tokens of its samples. One prompt comes every ``gap`` steps."""
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    rest = list(zip(prompts, params, strict=True))
    found: dict[int, dict[int, list[int]]] = {}
    steps = 0
    while rest or engine.has_work:
        while rest and (gap == 0 or steps >= gap * len(found)):
            found[engine.add(*rest.pop(0))] = {}
        for output in engine.step():
            if output.error is not None:
                raise output.error
            found[output.id].setdefault(output.index, []).extend(output.tokens)
        steps += 1
    assert_nothing_left(engine)
    return list(found.values())


def first_samples(engine: Engine, prompts: Sequence[Any], params: Any, **options: Any) -> Any:
    return [samples[0] for samples in run(engine, prompts, params, **options)]


def logits_of(engine: Engine) -> dict[tuple[int, int], torch.Tensor]:
    """Fills up with the logits by (request, position) that tokens are drawn from."""
    seen: dict[tuple[int, int], torch.Tensor] = {}
    choose = engine._sampler.choose

    def recording(logits, rows, guesses):
        for n, request in enumerate(rows.requests):
            seen[request.request_id, len(request.tokens)] = logits[rows.begins[n]].clone()
        return choose(logits, rows, guesses)

    engine._sampler.choose = recording  # type: ignore[method-assign]
    return seen


def assert_nothing_left(engine: Engine) -> None:
    """All blocks are given back, and nobody is remembered."""
    assert not engine.has_work
    cache = engine.stats().cache
    assert cache.sequences == cache.used_blocks == 0
    assert cache.free_blocks + cache.cached_blocks == cache.num_blocks
    assert not engine._live
    assert not engine._endings
