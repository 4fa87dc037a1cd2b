"""Runs a scheduler without a model: a cache of tokens in place of keys and values.

The pretended model's next token is a function of all the tokens that the block table leads to. So a
slot that was not written, written by another sequence or not copied shows in what is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np

from pumice.decode import BlockManager
from pumice.decode.request import Request, SamplingParams
from pumice.decode.scheduler import Plan, Scheduler

VOCABULARY = 5  # small: prompts have common beginnings by chance


def next_token(tokens: Sequence[int], seed: int = 0) -> int:
    value = seed
    for token in tokens:
        value = (value * 31 + token + 1) % 1009
    return value % VOCABULARY


def undisturbed(prompt: Sequence[int], count: int, seed: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed))
    return tokens[len(prompt) :]


class Driver:
    """The part of the engine, with drafts that are right or wrong as ``guess`` has it."""

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        *,
        max_batch_tokens: int = 16,
        max_sequences: int = 8,
        guess: Callable[[Request], list[int]] | None = None,
        **options: Any,
    ) -> None:
        self.manager = BlockManager(num_blocks, block_size, **{"watermark": 0, **options})
        self.scheduler = Scheduler(self.manager, max_batch_tokens, max_sequences)
        self.cache = np.full(num_blocks * block_size, -1)
        self.block_size = block_size
        self.guess = guess
        self.ids = count()
        self.live: dict[int, Request] = {}
        self.finished: dict[int, Request] = {}
        self.failed: list[Request] = []
        self.passes: list[Plan] = []
        self.poison: set[int] = set()  # ids of requests with which a pass fails
        self.flaky = 0  # so many next passes fail

    def add(self, prompt: Sequence[int], max_new_tokens: int = 4, **params: Any) -> Request:
        seed = params.pop("seed", 0)
        sampling = SamplingParams(max_new_tokens, **params)
        id = next(self.ids)
        request = Request(id, id, 0, sampling, seed, len(prompt), list(prompt), forks=sampling.n)
        self.scheduler.add(request)
        self.live[id] = request
        return request

    def cancel(self, request: Request) -> None:
        self.scheduler.remove([request])
        del self.live[request.id]

    def run(self, most: int = 10_000) -> None:
        for _ in range(most):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"still at work after {most} steps")

    def step(self) -> Plan:
        drafts = {}
        if self.guess:
            drafts = {
                request.id: self.guess(request)[: request.remaining - 1]
                for request in self.scheduler.generating()
            }
        plan = self.scheduler.schedule(drafts)
        assert plan is not None, "work, but nothing to do"
        self.passes.append(plan)
        self.check(plan)
        if self.flaky or self.poison & {request.id for request in plan.requests}:
            self.flaky = max(0, self.flaky - 1)
            if len(plan.requests) > 1:
                self.scheduler.failed(plan)
            else:
                self.scheduler.remove(plan.requests)
                self.failed.append(self.live.pop(plan.requests[0].id))
            return plan
        seen = self.forward(plan)
        accepted = [0] * len(plan.requests)
        new: dict[int, list[int]] = {}
        for i, request in enumerate(plan.requests):
            drafts_of = plan.num_drafts[i]
            if request.num_computed + plan.counts[i] - drafts_of < len(request.tokens):
                continue
            length = len(request.tokens)
            while (token := next_token(seen[i][:length], request.seed)) is not None:
                new.setdefault(request.id, []).append(token)
                if length == len(seen[i]) or seen[i][length] != token:
                    break
                length += 1
                accepted[i] += 1
        moves = self.scheduler.computed(plan, [range(n) for n in accepted])
        assert moves is None or not len(moves.source)  # chains stay where they are
        for i, request in enumerate(plan.requests):
            if request.id in new:
                self.take(request, new[request.id], seen[i])
        return plan

    def take(self, request: Request, tokens: list[int], seen: list[int]) -> None:
        family = [request]
        if request.forks > 1:
            for index in range(1, request.forks):
                child = Request(
                    next(self.ids), request.id, index, request.params, request.seed + index,
                    request.prompt_len, list(request.tokens),
                )  # fmt: skip
                self.live[child.id] = child
                family.append(child)
            self.scheduler.fork(request, family[1:])
        for member in family:
            if len(family) > 1:
                tokens = [next_token(seen, member.seed)]
            member.tokens += tokens
            assert member.num_generated <= member.params.max_new_tokens
            if member.remaining == 0:
                self.scheduler.remove([member])
                self.finished[member.id] = self.live.pop(member.id)

    def forward(self, plan: Plan) -> list[list[int]]:
        """Write the tokens, then read every sequence through its block table."""
        blocks = self.cache.reshape(-1, self.block_size)
        blocks[plan.step.copies[:, 1]] = blocks[plan.step.copies[:, 0]]
        self.cache[plan.step.slot_mapping] = plan.tokens
        seen = []
        for row, length in zip(plan.step.block_table, plan.step.seq_lens, strict=True):
            places = np.arange(length)
            slots = row[places // self.block_size] * self.block_size + places % self.block_size
            seen.append(self.cache[slots].tolist())
        return seen

    def check(self, plan: Plan) -> None:
        assert plan.requests
        assert (plan.counts > 0).all()
        assert plan.counts.sum() == len(plan.tokens) == len(plan.step.slot_mapping)
        assert len(plan.tokens) <= self.scheduler.max_batch_tokens
        assert len(set(plan.step.slot_mapping.tolist())) == len(plan.tokens)
        running = self.scheduler.running
        assert len(running) <= self.scheduler.max_sequences
        ages = [(request.request_id, request.index) for request in running]
        assert ages == sorted(ages)
        waiting = [(request.request_id, request.index) for request in self.scheduler.waiting]
        assert waiting == sorted(waiting)

    def assert_empty(self) -> None:
        """No block is lost."""
        stats = self.manager.stats()
        assert stats.sequences == stats.used_blocks == 0
        assert stats.free_blocks + stats.cached_blocks == self.manager.num_blocks

    def assert_as_undisturbed(self) -> None:
        for request in self.finished.values():
            expected = undisturbed(
                request.tokens[: request.prompt_len], request.num_generated, request.seed
            )
            assert request.tokens[request.prompt_len :] == expected
