"""Which tokens of which requests go into the next forward pass.

Continuous batching (Yu et al., "Orca", OSDI 2022): requests join and leave at every step. A pass
holds, packed one behind the other, the last token of each request that generates (and its drafts),
and pieces of prompts that are still being read (Agrawal et al., "Sarathi-Serve", OSDI 2024), no
more than ``max_batch_tokens`` together. Generating requests come first, so a long prompt delays
them by the time of one pass.

When the blocks run out, the youngest running request gives its blocks back and waits. It is
computed again, prompt and what it had generated, when there is room (recomputation as in Kwon et
al., 2023): its tokens are kept, so nobody sees a difference. Requests are admitted in the order of
arrival, and the oldest one is never preempted: with room for any one request alone, which
:meth:`Scheduler.add` demands, all of them end.

A request that begins like one that is read in the same pass reads the rest only: in each layer all
keys of a pass are written before any query looks at them, so the blocks that the other one fills
serve both. Hence blocks can be found from the moment they are planned; after a pass that fails none
can any more.

No torch here: a :class:`Plan` is numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from pumice.decode.block_manager import BlockManager, Step
from pumice.decode.draft_slots import Moves, keep_drafts
from pumice.decode.request import Request

__all__ = ["Plan", "Scheduler"]


@dataclass
class Plan:
    """One forward pass: of ``requests[i]`` it computes ``counts[i]`` tokens, ``tokens`` in all.

    The last ``num_drafts[i]`` of these are drafts. ``step`` is what the kernels need.
    """

    requests: list[Request]
    sequences: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    num_drafts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    step: Step


class Scheduler:
    """The queues of waiting and running requests, over the books of a block manager.

    A step is :meth:`generating` (those may be given drafts), :meth:`schedule`, and, after the
    forward pass, :meth:`computed`, or :meth:`failed` where it raised.
    """

    def __init__(self, manager: BlockManager, max_batch_tokens: int, max_sequences: int) -> None:
        if not 1 <= max_sequences <= max_batch_tokens:
            # Else those that generate could not all take part in a pass, and none would read.
            raise ValueError(
                f"max_sequences must be in [1, max_batch_tokens = {max_batch_tokens}], not "
                f"{max_sequences}"
            )
        self.manager = manager
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        # What admission leaves free does not count: a request must be able to come in.
        self.capacity = (manager.num_blocks - manager.watermark_blocks) * manager.block_size
        self.waiting: deque[Request] = deque()  # both in the order of arrival
        self.running: list[Request] = []
        self.preemptions = 0
        self._suspects = False  # whether there is any: looking for them takes time
        self._announced = False  # blocks can be found that a pass has yet to write

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue.

        Raises ValueError where the cache could not hold it alone.
        """
        # The last token is never computed.
        needed = request.prompt_len + request.params.max_new_tokens - 1
        if needed > self.capacity:
            raise ValueError(
                f"a prompt of {request.prompt_len} tokens and max_new_tokens = "
                f"{request.params.max_new_tokens} need room for {needed} tokens, but the cache has "
                f"{self.capacity} ({self.manager.num_blocks} blocks of {self.manager.block_size}, "
                f"{self.manager.watermark_blocks} kept free); use more blocks or ask for less"
            )
        if request.forks > self.max_sequences:
            raise ValueError(
                f"n = {request.forks} samples are more than max_sequences = {self.max_sequences}"
            )
        self._wait(request)
        self.waiting.append(request)

    def remove(self, requests: Iterable[Request]) -> None:
        """Requests that have ended, wherever they are: their blocks are given back."""
        gone = list(requests)
        if not gone:
            return
        held = [request for request in gone if request.sequence >= 0]
        if held:
            self.manager.free([request.sequence for request in held])
            for request in held:
                request.sequence = -1
        ended = {request.id for request in gone}
        if len(held) < len(gone):
            self.waiting = deque(r for r in self.waiting if r.id not in ended)
        self.running = [request for request in self.running if request.id not in ended]
        self._withdraw()

    def fork(self, parent: Request, children: Sequence[Request]) -> None:
        """Let the children, copies of a running request, share what it has computed."""
        sequences = self.manager.fork([parent.sequence] * len(children))
        for child, sequence in zip(children, sequences.tolist(), strict=True):
            child.sequence = sequence
            child.num_computed = parent.num_computed
        parent.forks = 1
        place = self.running.index(parent) + 1
        self.running[place:place] = children

    # A step.

    def generating(self) -> list[Request]:
        """The running requests of which the next pass computes the last token."""
        return [request for request in self._eligible() if request.generating]

    def schedule(self, drafts: Mapping[int, Sequence[int]] | None = None) -> Plan | None:
        """The next pass, whose tokens have their slots; None where there is nothing to do.

        ``drafts``: for ids of :meth:`generating`, tokens to compute beside the last one.
        """
        drafts = dict(drafts or {})
        requests, counts, preempted = self._grow(drafts)
        sequences, tokens = _ids(requests), _tokens(requests, counts, drafts)
        step = self.manager.append(sequences, tokens, counts)
        drafted = _num_drafts(requests, drafts)
        if self.waiting and not preempted:
            # Those that read a prompt; what others generate hardly begins a prompt that waits.
            self._announce(sequences[np.array(counts, np.int64) - drafted > 1])
            if self._admit(requests, counts):
                sequences, tokens = _ids(requests), _tokens(requests, counts, drafts)
                step = self.manager.view(sequences, counts)._replace(copies=step.copies)
                drafted = _num_drafts(requests, drafts)
        if not requests:
            return None
        return Plan(requests, sequences, np.array(counts, np.int64), drafted, tokens, step)

    def computed(self, plan: Plan, kept: Sequence[Sequence[int]] | None = None) -> Moves | None:
        """The forward pass is done.

        ``kept``: for each request of the plan which of its drafts stay, by number, ascending; None:
        there were none. Returns what the cache has to copy before the next pass, if anything.
        """
        counts, moves = plan.counts, None
        if kept is not None and plan.num_drafts.any():
            stay = np.fromiter(map(len, kept), np.int64, len(kept))
            counts = plan.counts - plan.num_drafts + stay
            moves = keep_drafts(
                self.manager, plan.sequences, plan.step, plan.tokens, plan.counts, plan.num_drafts,
                kept,
            )  # fmt: skip
        self.manager.commit(plan.sequences)
        self._announced = False
        for request, count in zip(plan.requests, counts.tolist(), strict=True):
            request.num_computed += count
        return moves

    def failed(self, plan: Plan) -> None:
        """The forward pass raised: whatever it wrote is forgotten, and its requests wait.

        Which of them is to blame is not known. Each is computed alone from now on until it has
        passed the point where this happened, so that the one that cannot will fail alone.
        """
        for request, count in zip(plan.requests, plan.counts.tolist(), strict=True):
            request.suspect_until = max(request.suspect_until, request.num_computed + count)
        self._suspects = True
        for request in reversed(plan.requests):
            self._preempt(request)
        self._withdraw()

    # The parts of it.

    def _eligible(self) -> list[Request]:
        """The running requests that may take part: all, or one that is suspected."""
        suspect = self._suspect()
        if suspect is None:
            return self.running
        return [suspect] if suspect.sequence >= 0 else []

    def _suspect(self) -> Request | None:
        """The oldest request that has to run alone."""
        if not self._suspects:
            return None
        found = next((r for r in chain(self.running, self.waiting) if r.suspect), None)
        self._suspects = found is not None
        return found

    def _grow(self, drafts: dict[int, Sequence[int]]) -> tuple[list[Request], list[int], bool]:
        """The running requests that take part, their counts, and whether any was preempted."""
        preempted = False
        while True:
            requests, counts = self._share(drafts)
            if not requests or self.manager.can_append(_ids(requests), counts):
                return requests, counts, preempted
            if drafts:
                drafts.clear()  # a guess is not worth anybody's place
            else:
                self._preempt(self._youngest(requests))
                preempted = True

    def _share(self, drafts: Mapping[int, Sequence[int]]) -> tuple[list[Request], list[int]]:
        """Deal out ``max_batch_tokens``: first a token each to those that generate."""
        eligible = self._eligible()
        left = self.max_batch_tokens
        counts: list[int] = []
        reading = False
        for request in eligible:
            count = len(request.tokens) - request.num_computed
            if count == 1:
                count += len(drafts.get(request.id, ())) if drafts else 0
                left -= count
            else:
                reading = True
                count = -count
            counts.append(count)
        if left < 0:
            raise ValueError("more drafts than max_batch_tokens has room for")
        if not reading:
            return list(eligible), counts
        requests, shares = [], []
        for request, count in zip(eligible, counts, strict=True):
            if count < 0:
                count = min(-count, left)
                left -= count
            if count:
                requests.append(request)
                shares.append(count)
        return requests, shares

    def _announce(self, sequences: npt.NDArray[np.int64]) -> None:
        """Let those that are admitted after these find what the next pass writes of them."""
        if len(sequences):
            self.manager.commit(sequences)
            self._announced = True

    def _withdraw(self) -> None:
        """Let nobody find what was announced by a pass that has not succeeded."""
        if self._announced:
            self.manager.clear_cache()
            self._announced = False

    def _youngest(self, taking_part: Sequence[Request]) -> Request:
        """Whose turn to give way it is: a request that runs alone asks all the others first."""
        others = [r for r in self.running if not r.suspect] if taking_part[0].suspect else None
        return others[-1] if others else self.running[-1]

    def _preempt(self, request: Request) -> None:
        self.manager.free(request.sequence)
        request.sequence = -1
        request.num_computed = 0
        request.preemptions += 1
        self.preemptions += 1
        self.running.remove(request)
        self._wait(request)
        # Before all that arrived later.
        place = next((i for i, r in enumerate(self.waiting) if _age(r) > _age(request)), None)
        if place is None:
            self.waiting.append(request)
        else:
            self.waiting.insert(place, request)

    def _wait(self, request: Request) -> None:
        request.array = np.array(request.tokens, np.int32)

    def _admit(self, requests: list[Request], counts: list[int]) -> bool:
        """Let waiting requests in, in order, while there is room for all of the next one."""
        suspect = self._suspect()
        if suspect is not None:
            return suspect.sequence < 0 and self._admit_alone(suspect, requests, counts)
        left = self.max_batch_tokens - sum(counts)
        slots = self.max_sequences - sum(request.forks for request in self.running)
        before = len(requests)
        while self.waiting and left > 0 and self.waiting[0].forks <= slots:
            request = self.waiting[0]
            if not self.manager.can_allocate(request.array):
                break
            requests.append(request)
            counts.append(self._start(request, left))
            self._announce(_ids([request]))
            left -= counts[-1]
            slots -= request.forks
        return len(requests) > before

    def _admit_alone(self, suspect: Request, requests: list[Request], counts: list[int]) -> bool:
        """Let one request in, even if all the others have to go."""
        while self.running and (
            sum(r.forks for r in self.running) + suspect.forks > self.max_sequences
            or not self.manager.can_allocate(suspect.array)
        ):
            self._preempt(self.running[-1])
        requests.append(suspect)
        counts.append(self._start(suspect, self.max_batch_tokens))
        return True

    def _start(self, request: Request, limit: int) -> int:
        """Give a waiting request a sequence; how many tokens of it are computed first."""
        new = self.manager.allocate(request.array, limit=limit)
        self.waiting.remove(request)
        request.sequence = new.id
        request.num_computed = new.cached_tokens
        if request.preemptions == 0:
            request.num_cached = new.cached_tokens
        place = len(self.running)
        while place and _age(self.running[place - 1]) > _age(request):
            place -= 1
        self.running.insert(place, request)
        return new.num_tokens - new.cached_tokens


def _age(request: Request) -> tuple[int, int]:
    return request.request_id, request.index


def _ids(requests: Sequence[Request]) -> npt.NDArray[np.int64]:
    return np.array([request.sequence for request in requests], np.int64)


def _num_drafts(
    requests: Sequence[Request], drafts: Mapping[int, Sequence[int]]
) -> npt.NDArray[np.int64]:
    if not drafts:
        return np.zeros(len(requests), np.int64)
    return np.array([len(drafts.get(request.id, ())) for request in requests], np.int64)


def _tokens(
    requests: Sequence[Request], counts: Sequence[int], drafts: Mapping[int, Sequence[int]]
) -> npt.NDArray[np.int64]:
    """The tokens to compute, request after request."""
    if len(requests) == sum(counts):  # the usual step: one each
        return np.array([r.tokens[r.num_computed] for r in requests], np.int64)
    flat: list[int] = []
    for request, count in zip(requests, counts, strict=True):
        begin = request.num_computed
        flat += request.tokens[begin : begin + count]
        if drafts:
            flat += drafts.get(request.id, ())
    return np.array(flat, np.int64)
