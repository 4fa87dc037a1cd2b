"""The block manager: operations a second, and how much of the cache's memory holds tokens.

Memory is measured as PagedAttention's paper does (Kwon et al., 2023, section 6): requests with the
lengths of a chat trace arrive faster than they can be served, so that the pool stays full, and of
the slots that are set aside for the running requests we count those that hold a token. The
contiguous contenders reserve a request's slots when it is admitted, in one piece:

    max      as many as the longest request may have
    pow2     the prompt, and the power of two that covers the output (its length guessed so well)
    oracle   the prompt and the output, had its length been known

Their pieces are placed by a buddy allocator, as in the paper, and the oracle's also first-fit: the
best that a contiguous cache could hope for. The paged one takes a block at a time and, when the
pool runs out, puts the youngest request back into the queue, to be computed anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pumice.decode import BlockManager, OutOfBlocksError

MAX_TOKENS = 2048  # the longest request, as in the paper


@dataclass(frozen=True)
class Request:
    """Lengths in tokens."""

    prompt: int
    output: int


@dataclass(frozen=True)
class Memory:
    """Averages over the steps at which requests waited.

    ``of_reserved``: slots that hold a token, of those set aside for running requests.
    ``of_pool``: of all slots. ``running``: requests at a time. ``preempted``: put back.
    """

    name: str
    of_reserved: float
    of_pool: float
    running: float
    preempted: int


def chat_trace(requests: int, seed: int = 0) -> list[Request]:
    """Log-normal lengths, of ShareGPT's means (161 and 338 tokens) before they are cut.

    Prompt and output are cut to half of MAX_TOKENS each, so that every request fits "max".
    """
    random = np.random.default_rng(seed)

    def lengths(mean: float, sigma: float) -> list[int]:
        drawn = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, requests)
        return [int(length) for length in np.clip(drawn, 4, MAX_TOKENS // 2)]

    pairs = zip(lengths(161, 1.2), lengths(338, 0.9), strict=True)
    return [Request(prompt, output) for prompt, output in pairs]


@dataclass
class _Means:
    """Sums over the steps that count."""

    steps: int = 0
    stored: int = 0
    reserved: int = 0
    running: int = 0

    def add(self, stored: int, reserved: int, running: int) -> None:
        self.steps += 1
        self.stored += stored
        self.reserved += reserved
        self.running += running

    def memory(self, name: str, slots: int, preempted: int = 0) -> Memory:
        if self.steps == 0:
            raise ValueError(f"{name}: no request ever waited; the trace is too short for the pool")
        return Memory(
            name,
            self.stored / self.reserved,
            self.stored / (self.steps * slots),
            self.running / self.steps,
            preempted,
        )


def paged(
    trace: list[Request], slots: int, block_size: int = 16, watermark: float = 0.01
) -> Memory:
    """The trace over a :class:`pumice.decode.BlockManager`."""
    manager = BlockManager(
        slots // block_size, block_size, prefix_caching=False, watermark=watermark
    )
    waiting, means, preempted = deque(trace), _Means(), 0
    running: dict[int, tuple[Request, int]] = {}  # id: the request, and its length at the end
    while waiting or running:
        while waiting and manager.can_allocate(num_tokens=waiting[0].prompt):
            request = waiting.popleft()
            new = manager.allocate(num_tokens=request.prompt)
            running[new.id] = request, request.prompt + request.output
        while True:
            ids = np.fromiter(running, np.int64, len(running))
            try:
                lengths = manager.append(ids).seq_lens
                break
            except OutOfBlocksError:
                youngest = max(running)
                manager.free(youngest)
                waiting.appendleft(running.pop(youngest)[0])
                preempted += 1
        if waiting:
            stats = manager.stats()
            means.add(stats.stored_tokens, stats.used_blocks * block_size, len(running))
        ends = np.fromiter((end for _, end in running.values()), np.int64, len(running))
        finished = ids[lengths >= ends]
        manager.free(finished)
        for id in finished.tolist():
            del running[id]
    return means.memory("paged", manager.num_blocks * block_size, preempted)


class _Buddy:
    """A memory of power-of-two pieces, each of which is halved or joined with its other half."""

    def __init__(self, slots: int) -> None:
        if slots & (slots - 1):
            raise ValueError(f"a buddy allocator needs a power of two of slots, not {slots}")
        self.order = slots.bit_length() - 1
        self.free: list[set[int]] = [set() for _ in range(self.order)] + [{0}]

    def take(self, size: int) -> int | None:
        order = (size - 1).bit_length()
        found = next((o for o in range(order, self.order + 1) if self.free[o]), None)
        if found is None:
            return None
        begin = min(self.free[found])
        self.free[found].remove(begin)
        while found > order:
            found -= 1
            self.free[found].add(begin + (1 << found))
        return begin

    def give_back(self, begin: int, size: int) -> None:
        order = (size - 1).bit_length()
        while begin ^ (1 << order) in self.free[order]:
            self.free[order].remove(begin ^ (1 << order))
            begin &= ~(1 << order)
            order += 1
        self.free[order].add(begin)

    def reserved(self, size: int) -> int:
        return 1 << (size - 1).bit_length()


@dataclass
class _FirstFit:
    """A memory of so many slots, from which contiguous pieces are cut."""

    slots: int
    holes: list[tuple[int, int]] = field(default_factory=list)  # (begin, end), ascending

    def __post_init__(self) -> None:
        self.holes = [(0, self.slots)]

    def take(self, size: int) -> int | None:
        for i, (begin, end) in enumerate(self.holes):
            if end - begin >= size:
                self.holes[i : i + 1] = [(begin + size, end)] if end - begin > size else []
                return begin
        return None

    def give_back(self, begin: int, size: int) -> None:
        holes = sorted([*self.holes, (begin, begin + size)])
        merged = holes[:1]
        for hole in holes[1:]:
            if hole[0] == merged[-1][1]:
                merged[-1] = merged[-1][0], hole[1]
            else:
                merged.append(hole)
        self.holes = merged

    def reserved(self, size: int) -> int:
        return size


@dataclass
class _Running:
    begin: int
    size: int
    length: int
    end: int


RESERVED: dict[str, Callable[[Request], int]] = {
    "max": lambda request: MAX_TOKENS,
    "pow2": lambda request: request.prompt + (1 << (request.output - 1).bit_length()),
    "oracle": lambda request: request.prompt + request.output,
}


def contiguous(trace: list[Request], slots: int, name: str, *, first_fit: bool = False) -> Memory:
    """The trace over one of RESERVED."""
    memory: _FirstFit | _Buddy = _FirstFit(slots) if first_fit else _Buddy(slots)
    waiting, means = deque(trace), _Means()
    running: list[_Running] = []
    while waiting or running:
        while waiting:
            size = RESERVED[name](waiting[0])
            begin = memory.take(size)
            if begin is None:
                break
            request = waiting.popleft()
            total = request.prompt + request.output
            running.append(_Running(begin, size, request.prompt, total))
        if not running:
            raise ValueError(f"{name}: a request needs more than the {slots} slots of the pool")
        for one in running:
            one.length += 1
        if waiting:
            stored = sum(r.length for r in running)
            means.add(stored, sum(memory.reserved(r.size) for r in running), len(running))
        for done in [r for r in running if r.length >= r.end]:
            memory.give_back(done.begin, done.size)
            running.remove(done)
    return means.memory(f"{name}, first-fit" if first_fit else name, slots)


def memory_table(requests: int = 2000, slots: int = 32 * 1024, seed: int = 0) -> list[Memory]:
    """All contenders over one trace: paged first."""
    trace = chat_trace(requests, seed)
    best = contiguous(trace, slots, "oracle", first_fit=True)
    return [paged(trace, slots), *(contiguous(trace, slots, name) for name in RESERVED), best]


def append_rate(sequences: int = 256, steps: int = 500, prefix_caching: bool = True) -> float:
    """Tokens appended (and committed) a second, one for each of many sequences in a call."""
    manager = BlockManager(sequences * (steps // 16 + 32), 16, prefix_caching=prefix_caching)
    random = np.random.default_rng(0)
    prompts = random.integers(0, 32000, (sequences, 256))
    ids = np.array([manager.allocate(prompt).id for prompt in prompts])
    tokens = random.integers(0, 32000, (steps, sequences))
    start = time.perf_counter()
    for row in tokens:
        manager.append(ids, row)
        manager.commit(ids)
    return sequences * steps / (time.perf_counter() - start)


def sequence_rate(sequences: int = 20000) -> float:
    """Sequences of 100 tokens begun and ended a second, one in a call."""
    manager = BlockManager(1024, 16)
    tokens = np.arange(100)
    start = time.perf_counter()
    for _ in range(sequences):
        manager.free(manager.allocate(tokens).id)
    return sequences / (time.perf_counter() - start)


def tables() -> str:
    """Both, in Markdown."""
    lines = [
        "| operation | a second |",
        "|---|---|",
        f"| append and commit a token, 256 sequences a call | {append_rate() / 1e6:.1f} M |",
        f"| the same without the prefix cache | {append_rate(prefix_caching=False) / 1e6:.1f} M |",
        f"| allocate and free 100 tokens, one sequence a call | {sequence_rate() / 1e3:.0f} k |",
        "",
        "| reservation | tokens, of reserved slots | of the pool | running | preempted |",
        "|---|---|---|---|---|",
    ]
    for row in memory_table():
        lines.append(
            f"| {row.name} | {100 * row.of_reserved:.1f} % | {100 * row.of_pool:.1f} % "
            f"| {row.running:.1f} | {row.preempted} |"
        )
    return "\n".join(lines)
