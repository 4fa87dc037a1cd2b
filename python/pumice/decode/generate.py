"""One call: prompts in, texts out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import nn

from pumice.decode.draft import Draft
from pumice.decode.draft_tree import TreeDraft
from pumice.decode.engine import CACHE_BYTES, Engine
from pumice.decode.output import Completion, Output, TextStream
from pumice.decode.pool import CachePool
from pumice.decode.request import SamplingParams, check_prompt

__all__ = ["GenerationError", "generate"]

_CONTEXT = 12  # tokens of the prompt that its continuation is decoded with


class GenerationError(RuntimeError):
    """Some of the requests failed. ``completions`` holds all, those that did not fail complete."""

    def __init__(self, message: str, completions: list[Completion]) -> None:
        super().__init__(message)
        self.completions = completions


@overload
def generate(
    model: nn.Module,
    prompts: Any,
    *,
    stream: Literal[False] = False,
    **options: Any,
) -> list[Completion]: ...


@overload
def generate(
    model: nn.Module,
    prompts: Any,
    *,
    stream: Literal[True],
    **options: Any,
) -> Iterator[Output]: ...


def generate(
    model: nn.Module,
    prompts: Any,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    n: int = 1,
    stop_token_ids: Sequence[int] = (),
    stop: str | Sequence[str | Sequence[int]] = (),
    ignore_eos: bool = False,
    logprobs: bool = False,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    stream: bool = False,
    draft: Draft | TreeDraft | None = None,
    **engine: Any,
) -> list[Completion] | Iterator[Output]:
    """Continue prompts, many at once, on a paged cache with continuous batching.

    ::

        for completion in pumice.generate(model, ["Once upon", "It was"], tokenizer=tokenizer):
            print(completion.text)

        for output in pumice.generate(model, "Once upon", tokenizer=tokenizer, stream=True):
            print(output.text, end="", flush=True)

    The prompts need not fit the cache together, nor be of like length: nothing is padded, those
    that end make room for others. Greedy tokens are those of transformers' ``generate``, but for
    rounding (:class:`~pumice.decode.Engine` says when, and what ``batch_invariant`` does).

    Args:
        model: of transformers, or with ``forward_paged`` (:mod:`pumice.decode.model`).
        prompts: one or several: strings, which the tokenizer encodes, or token ids.
        tokenizer: of transformers; for strings, text and stop strings.
        max_new_tokens … logprobs: see :class:`~pumice.decode.SamplingParams`. With a ``seed``,
            prompt i has seed + i · n: each draws numbers of its own.
        params: instead of all these, parameters for all prompts or for each. They are taken as they
            are: one seed for all prompts is one seed.
        stream: return an iterator over :class:`~pumice.decode.Output`, step by step as they come;
            ``output.id`` is the index of the prompt, ``index`` of the sample. Closing it (or
            leaving it to the garbage collector) ends everything.
        draft: for speculative decoding: :mod:`pumice.decode.draft`, or
            :mod:`pumice.decode.draft_tree`.
        **engine: of :class:`~pumice.decode.Engine`. The cache is by default as large as all
            prompts need together, but at most 512 MiB.

    Returns:
        for each prompt, n completions, in order.

    Raises:
        TypeError, ValueError: prompts, parameters or options that cannot be; before anything runs.
        GenerationError: when all the others have ended: requests with which the model raised.
    """
    ids = [_encode(prompt, tokenizer) for prompt in _as_list(prompts)]
    if params is None:
        each = [
            SamplingParams(
                max_new_tokens, temperature, top_k, top_p, min_p,
                None if seed is None else seed + i * n,
                n, tuple(stop_token_ids), stop, ignore_eos, logprobs,  # type: ignore[arg-type]
            )
            for i in range(len(ids))
        ]  # fmt: skip
    else:
        each = [params] * len(ids) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(ids):
        raise ValueError(f"{len(each)} params were given for {len(ids)} prompts")
    strings = any(one.stop_strings for one in each)
    if "num_blocks" not in engine and "cache_bytes" not in engine and ids:
        engine["num_blocks"] = _enough_blocks(model, ids, each, engine)
    live = Engine(model, tokenizer=tokenizer if stream or strings else None, draft=draft, **engine)
    try:
        prompt_of = {
            live.add(prompt, one): i for i, (prompt, one) in enumerate(zip(ids, each, strict=True))
        }
    except BaseException:
        live.close()
        raise
    if stream:
        return _stream(live, prompt_of)
    return _collect(live, prompt_of, ids, each, tokenizer)


def _stream(engine: Engine, prompt_of: dict[int, int]) -> Iterator[Output]:
    with engine:
        while engine.has_work:
            for output in engine.step():
                output.id = prompt_of[output.id]
                yield output


def _collect(
    engine: Engine,
    prompt_of: dict[int, int],
    prompts: Sequence[Any],
    params: Sequence[SamplingParams],
    tokenizer: Any,
) -> list[Completion]:
    found: dict[tuple[int, int], Completion] = {}
    for output in _stream(engine, prompt_of):
        key = (output.id, output.index)
        completion = found.get(key)
        if completion is None:
            completion = found[key] = Completion(output.id, output.index, output.seed)
            completion.logprobs = [] if params[output.id].logprobs else None
        completion.tokens += output.tokens
        if output.text is not None:
            completion.text = (completion.text or "") + output.text
        if output.logprobs and completion.logprobs is not None:
            completion.logprobs += output.logprobs
        completion.finish_reason, completion.stop = output.finish_reason, output.stop
        completion.error = output.error
    completions = [found[key] for key in sorted(found)]
    if tokenizer is not None and engine.tokenizer is None:
        for completion in completions:
            # All at once: the same text, for less time than piece by piece.
            text = TextStream(tokenizer, (), prompts[completion.prompt_index][-_CONTEXT:].tolist())
            completion.text = text.add(completion.tokens) + text.finish()
    failed = [completion for completion in completions if completion.error is not None]
    if failed:
        first = failed[0]
        raise GenerationError(
            f"{len(failed)} of {len(completions)} completions failed, the first of prompt "
            f"{first.prompt_index}: {type(first.error).__name__}: {first.error}",
            completions,
        ) from first.error
    return completions


def _as_list(prompts: Any) -> list[Any]:
    """One prompt as a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, torch.Tensor) or hasattr(prompts, "ndim"):
        return [prompts] if prompts.ndim == 1 else list(prompts)
    if not isinstance(prompts, Sequence):
        raise TypeError(
            "prompts must be a string, token ids, or a sequence of these, not "
            f"{type(prompts).__name__}"
        )
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]
    return list(prompts)


def _encode(prompt: Any, tokenizer: Any) -> Any:
    if not isinstance(prompt, str):
        return check_prompt(prompt, None)
    if tokenizer is None:
        raise ValueError("prompts are strings: generate needs a tokenizer for them")
    return check_prompt(tokenizer(prompt).input_ids, None)


def _enough_blocks(
    model: nn.Module, prompts: Sequence[Any], params: Sequence[SamplingParams], engine: Any
) -> int:
    """For all sequences at once, with some spare; no more than CACHE_BYTES hold, but for one."""
    size: int = engine.get("block_size", 16)
    of_sequences = [
        [-(-(len(prompt) + one.max_new_tokens) // size)] * one.n
        for prompt, one in zip(prompts, params, strict=True)
    ]
    most: int = max(max(of_one) for of_one in of_sequences)
    total: int = sum(sum(of_one) for of_one in of_sequences)
    each = CachePool.bytes_per_block(model, block_size=size, cache_dtype=engine.get("cache_dtype"))
    watermark = 1 + total // 64
    return max(min(total + watermark, CACHE_BYTES // each), most + 1 + most // 64)
