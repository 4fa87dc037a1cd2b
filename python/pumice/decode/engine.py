"""Many requests at once on one model: continuous batching over a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pumice.decode.block_manager import BlockManager, Stats
from pumice.decode.draft import Draft
from pumice.decode.draft_tree import TreeDraft
from pumice.decode.drafting import Drafting
from pumice.decode.ending import Ending
from pumice.decode.invariance import check_batch_invariance
from pumice.decode.limits import eos_token_ids, length_limit
from pumice.decode.output import Output
from pumice.decode.packing import pack, upload
from pumice.decode.pool import CachePool
from pumice.decode.request import Request, SamplingParams, UnknownRequestError, check_prompt
from pumice.decode.runner import ModelRunner
from pumice.decode.sampler import Choice, Guesses, Rows, Sampler
from pumice.decode.scheduler import Plan, Scheduler

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CACHE_BYTES", "Engine", "EngineStats"]

CACHE_BYTES = 1 << 29  # of the cache, where nothing is said


@dataclass(frozen=True)
class EngineStats:
    """Since construction: forward ``passes``, ``computed_tokens`` in them, ``generated_tokens``
    given out, ``preemptions``, ``drafted`` tokens looked at and ``accepted`` ones of them,
    ``failed_passes``. At present: requests ``running`` and ``waiting``, and the cache's account.
    """

    passes: int
    computed_tokens: int
    generated_tokens: int
    preemptions: int
    drafted: int
    accepted: int
    failed_passes: int
    running: int
    waiting: int
    cache: Stats


class Engine:
    """Generates for requests that come and go, all those present together in each pass::

        engine = Engine(model, num_blocks=1000)
        a = engine.add(prompt, SamplingParams(max_new_tokens=100))
        while engine.has_work:
            for output in engine.step():
                print(output.id, output.tokens, output.finish_reason)

    A step is one forward pass, of a token (with drafts, several) for each request that generates
    and of pieces of prompts: see :mod:`pumice.decode.scheduler`. Prompts that begin like earlier
    ones are not read again (``prefix_cache``). To be used by one thread at a time.

    **What can go wrong** concerns one request. A forward pass that raises is taken back, its
    requests are computed again one at a time, and the one with which it raises again ends with
    finish_reason "error"; so does one whose logits are no distribution (NaN). A draft that raises
    is a RuntimeWarning, and its step goes without. All blocks of what has ended are given back.

    **The same whatever else is in the batch?** Each sequence's attention and sampling have the same
    bits in any company, but matrix products have not: libraries choose another kernel, and order of
    summation, for another number of rows. So logits differ in their last bits from batch to batch,
    and once in a while a close call between two tokens turns out otherwise. ``batch_invariant``
    rules that out by making every pass one of exactly ``max_batch_tokens`` rows, filled up with
    tokens of no sequence: a request's tokens and logits then have the same bits alone, in company,
    read in other pieces, after a preemption or with a prefix found in the cache. That rests on a
    product's row not depending on where in the matrix it stands, which is tried out on the model
    at construction (RuntimeError otherwise; a mixture of experts may fail). It costs what the
    filling costs, a pass takes the time of a full one: 1.6 times the time for SmolLM2-135M on a CPU
    with 8 requests in passes of 16.

    Args:
        model: of transformers, or with ``forward_paged``: :mod:`pumice.decode.model`.
        num_blocks: of the cache; or ``cache_bytes``, by default 512 MiB.
        block_size: tokens a block.
        max_batch_tokens: in a pass, by default 512 (64 if batch_invariant).
        max_sequences: running together, at most max_batch_tokens; by default 64.
        max_length: of a sequence; by default the model's ``max_position_embeddings``, if it says.
            Where rotary frequencies depend on the length (longrope), by default no more than has
            those of short texts; given more, all texts have those of max_length tokens.
        cache_dtype: None for the model's own; see :class:`~pumice.decode.CachePool`.
        draft: proposes tokens for speculative decoding, chains or trees of them. Trees do not go
            with layers that have a window: windows count slots of the cache, and in a tree these
            are no positions. Nor do they with batch_invariant.
        prefix_cache: share the cache of common beginnings, also with requests that have ended.
        tokenizer: to give text, and to find stop strings.
        batch_invariant: see above.

    Raises:
        TypeError, NotImplementedError: a model that is neither, or of unknown state.
        ValueError: sizes out of range; a draft with another vocabulary, or of trees where they do
            not go.
        RuntimeError: batch_invariant, but the model is not.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_blocks: int | None = None,
        cache_bytes: int | None = None,
        block_size: int = 16,
        max_batch_tokens: int | None = None,
        max_sequences: int | None = None,
        max_length: int | None = None,
        cache_dtype: torch.dtype | None = None,
        draft: Draft | TreeDraft | None = None,
        prefix_cache: bool = True,
        tokenizer: Any = None,
        batch_invariant: bool = False,
    ) -> None:
        if num_blocks is not None and cache_bytes is not None:
            raise ValueError("Engine: give either num_blocks or cache_bytes")
        if num_blocks is None:
            each = CachePool.bytes_per_block(model, block_size=block_size, cache_dtype=cache_dtype)
            num_blocks = (CACHE_BYTES if cache_bytes is None else cache_bytes) // each
            if num_blocks < 1:
                raise ValueError(
                    f"Engine: cache_bytes = {cache_bytes} is less than one block of {each} bytes"
                )
        if max_batch_tokens is None:
            max_batch_tokens = 64 if batch_invariant else 512
        self.runner = ModelRunner(
            model, num_blocks=num_blocks, block_size=block_size, cache_dtype=cache_dtype
        )
        self.max_length, self._mark = length_limit(self.runner.paged_model, max_length)
        self._pad_to = max_batch_tokens if batch_invariant else 0
        if self._pad_to and self._mark is not None:  # it is one of the rows
            max_batch_tokens -= 1
        if max_sequences is None:
            max_sequences = min(64, max_batch_tokens)
        self._drafting = Drafting(draft, self.runner.vocab_size) if draft is not None else None
        if isinstance(draft, TreeDraft):
            self._check_trees(batch_invariant)
        self.manager = BlockManager(
            num_blocks,
            block_size,
            prefix_caching=prefix_cache,
            window_left=self.runner.geometry.window_left,
        )
        self.scheduler = Scheduler(self.manager, max_batch_tokens, max_sequences)
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids(model)
        if batch_invariant:
            check_batch_invariance(self.runner, self._pad_to)
        self._sampler = Sampler(self.runner.device)
        self._ids, self._sequence_ids = 0, count()
        self._live: dict[int, dict[int, Request]] = {}  # of a request: its sequences by index
        self._endings: dict[int, Ending] = {}  # by id of the sequence
        self._closed = False
        self._passes = self._computed = self._generated = self._failed = 0

    # Requests.

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, prompt: Any, params: SamplingParams | None = None) -> int:
        """Take a request in; its id. It takes part from the next step on, when there is room.

        Args:
            prompt: token ids, a vector of integers (list, array or tensor).
            params: greedy with 64 tokens by default. Without a seed one is drawn from torch's
                generator.

        Raises:
            TypeError, ValueError: the prompt is empty, not of integers or not of the vocabulary;
                with max_new_tokens it is longer than the cache or the model allows; stop strings
                without a tokenizer. Nothing has changed then.
            RuntimeError: the engine is closed.
        """
        self._check_open()
        params = params or SamplingParams()
        ids = check_prompt(prompt, self.runner.vocab_size)
        if params.stop_strings and self.tokenizer is None:
            raise ValueError(
                f"stop = {params.stop_strings!r} are strings: the engine needs a tokenizer for them"
            )
        length = len(ids) + params.max_new_tokens
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and max_new_tokens = {params.max_new_tokens} make "
                f"{length} tokens, but the model takes {self.max_length} (max_length)"
            )
        seed = params.seed
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        request = Request(
            next(self._sequence_ids), self._ids, 0, params, seed, len(ids), ids.tolist(),
            forks=params.n,
        )  # fmt: skip
        self.scheduler.add(request)
        self._ids += 1
        self._enter(request)
        return request.request_id

    def cancel(self, id: int) -> None:
        """End a request with all its samples; nothing more comes out of it.

        Raises UnknownRequestError if it has ended, or was cancelled, or never was.
        """
        requests = self._live.get(id)
        if requests is None:
            raise UnknownRequestError(
                f"request {id} has ended already, or was cancelled before"
                if 0 <= id < self._ids
                else f"there is no request {id}"
            )
        self._leave(list(requests.values()))

    def close(self) -> None:
        """Cancel everything; nothing can be asked of the engine any more. Again is harmless."""
        for id in list(self._live):
            self.cancel(id)
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def stats(self) -> EngineStats:
        return EngineStats(
            passes=self._passes,
            computed_tokens=self._computed,
            generated_tokens=self._generated,
            preemptions=self.scheduler.preemptions,
            drafted=self._drafting.drafted if self._drafting else 0,
            accepted=self._drafting.accepted if self._drafting else 0,
            failed_passes=self._failed,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            cache=self.manager.stats(),
        )

    # A step.

    def step(self) -> list[Output]:
        """One forward pass; what it added to which sequences (none to those still being read)."""
        self._check_open()
        guesses = self._drafting.propose(self.scheduler) if self._drafting else None
        plan = self.scheduler.schedule(guesses.tokens if guesses else None)
        if plan is None:
            if self.has_work:  # else a caller would step forever
                raise AssertionError("there are requests, but none can run; this is a bug")
            return []
        try:
            choices = self._forward(plan, guesses)
        except Exception as error:
            return self._take_back(plan, error)
        except BaseException:  # an interrupt: whoever goes on finds everything in order
            self.scheduler.failed(plan)
            raise
        kept = None
        if guesses is not None and self._drafting is not None:
            kept = self._drafting.outcome(guesses, plan, choices)
        moves = self.scheduler.computed(plan, kept)
        if moves is not None:
            self.runner.pool.move_tokens(*moves)
        self._passes += 1
        self._computed += len(plan.tokens)
        self._branch_off(choices)
        return self._give_out(choices)

    def _forward(self, plan: Plan, guesses: Guesses | None) -> list[Choice]:
        rows = Rows(plan)
        index = rows.index
        if self._pad_to:  # the output layer, too, always multiplies as many rows
            index = index.copy()
            index.resize(self._pad_to)
        trees = guesses.trees if guesses else None
        batch = pack(plan, self.runner.pool, self._pad_to, trees, self._mark)
        logits = self.runner.forward(batch, upload(index, self.runner.device))
        if tuple(logits.shape) != (len(index), self.runner.vocab_size):
            raise RuntimeError(
                f"the model gave logits of shape {list(logits.shape)} for {len(index)} rows and a "
                f"vocabulary of {self.runner.vocab_size}"
            )
        return self._sampler.choose(logits[: len(rows.index)], rows, guesses)

    def _take_back(self, plan: Plan, error: Exception) -> list[Output]:
        """A forward pass raised: its only request ends, or each of them is tried alone."""
        self._failed += 1
        if len(plan.requests) > 1:
            self.scheduler.failed(plan)
            return []
        request = plan.requests[0]
        output = self._endings[request.id].end(request, "error", error)
        self._leave([request])
        return [output]

    def _branch_off(self, choices: Sequence[Choice]) -> None:
        """Further samples of a request become sequences that share what it has computed."""
        families: dict[int, list[Choice]] = {}
        for choice in choices:
            if choice.child:
                families.setdefault(choice.request.id, []).append(choice)
        for family in families.values():
            parent = family[0].request
            for choice in family:
                child = Request(
                    next(self._sequence_ids), parent.request_id, choice.child, parent.params,
                    parent.seed + choice.child, parent.prompt_len, list(parent.tokens),
                )  # fmt: skip
                self._enter(child)
                choice.request = child
            self.scheduler.fork(parent, [choice.request for choice in family])

    def _give_out(self, choices: Sequence[Choice]) -> list[Output]:
        outputs = []
        gone = []
        for choice in choices:
            request, ending = choice.request, self._endings[choice.request.id]
            if choice.valid:
                logprobs = choice.logprobs if request.params.logprobs else None
                try:
                    output = ending.take(request, choice.tokens, logprobs)
                except Exception as error:  # of the tokenizer
                    output = ending.end(request, "error", error)
            else:
                output = ending.end(request, "error", _no_distribution(request))
            self._generated += len(output.tokens)
            outputs.append(output)
            if output.finish_reason is not None:
                gone.append(request)
        if gone:
            self._leave(gone)
        return outputs

    def _enter(self, request: Request) -> None:
        self._live.setdefault(request.request_id, {})[request.index] = request
        self._endings[request.id] = Ending(request, self.eos_token_ids, self.tokenizer)

    def _leave(self, requests: Sequence[Request]) -> None:
        self.scheduler.remove(requests)
        for request in requests:
            del self._endings[request.id]
            siblings = self._live[request.request_id]
            del siblings[request.index]
            if not siblings:
                del self._live[request.request_id]
            if self._drafting is not None:
                self._drafting.release(request)

    def _check_trees(self, batch_invariant: bool) -> None:
        if batch_invariant:
            raise ValueError(
                "Engine: batch_invariant computes each token as a sequence of its own, which the "
                "branches of a tree are not; use a draft of chains"
            )
        if any(window is not None for window in self.runner.geometry.windows):
            raise ValueError(
                f"Engine: {type(self.runner.model).__name__} has layers with a window, which trees "
                "do not go with; use a draft of chains"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")


def _no_distribution(request: Request) -> RuntimeError:
    return RuntimeError(
        f"the model's logits at position {len(request.tokens)} are no distribution: all of them "
        "are NaN or -inf"
    )
