"""Timing: contenders interleaved in one run, inputs rotated past the caches, medians and spread.

A contender is a function of an index. The index picks one of several copies of the inputs whose
total size exceeds the last-level cache (twice over on a GPU), so that a weight is read from memory
as it would be in a model, not from the cache its last call left it in.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Contender = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median over the rounds, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float
    calls: int

    @staticmethod
    def of(samples: list[float], calls: int) -> Timing:
        ordered = sorted(samples)
        return Timing(
            median=statistics.median(ordered),
            low=ordered[len(ordered) // 10],
            high=ordered[-1 - len(ordered) // 10],
            calls=calls,
        )


def copies_beyond_cache(bytes_each: int, cache_bytes: int) -> int:
    """How many copies of an input to rotate so that none is still cached when its turn comes."""
    return max(2, -(-2 * cache_bytes // max(bytes_each, 1)))


def measure(
    contenders: Mapping[str, Contender], device: torch.device, seconds: float = 1.0
) -> dict[str, Timing]:
    """Time every contender, in rounds, one after the other within a round.

    `seconds` is the time spent on each contender. Interleaving means that a slow phase of the
    machine (a neighbour, a lower clock) falls on all of them alike.
    """
    batch_of = _cuda_batch if device.type == "cuda" else _cpu_batch
    batches: dict[str, tuple[Batch, int, int]] = {}
    for name, call in contenders.items():
        single = _seconds_a_call(call, device)
        calls = max(1, min(1000, int(0.02 / single)))
        rounds = max(5, min(200, int(seconds / (single * calls))))
        batches[name] = batch_of(call, calls), calls, rounds

    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(max(rounds for _, _, rounds in batches.values())):
        for name, (batch, calls, rounds) in batches.items():
            if index < rounds:
                samples[name].append(batch(index) / calls * 1e6)
    return {n: Timing.of(samples[n], rounds * calls) for n, (_, calls, rounds) in batches.items()}


Batch = Callable[[int], float]  # from the index of the round to the seconds of all its calls


def _seconds_a_call(call: Contender, device: torch.device) -> float:
    """A first guess, after two calls that compile, allocate and touch the pages."""
    for index in range(2):
        call(index)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for index in range(2):
        call(index)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max((time.perf_counter() - begin) / 2, 1e-7)


def _cpu_batch(call: Contender, calls: int) -> Batch:
    def run(index: int) -> float:
        begin = time.perf_counter()
        for i in range(index, index + calls):
            call(i)
        return time.perf_counter() - begin

    return run


def _cuda_batch(call: Contender, calls: int) -> Batch:
    """The calls replayed from one CUDA graph, so that Python's launch overhead is not measured; a
    contender that cannot be captured is timed around plain calls."""
    graph = _capture(call, calls)

    def run(index: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        if graph is not None:
            graph.replay()
        else:
            for i in range(index, index + calls):
                call(i)
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return run


def _capture(call: Contender, calls: int) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for index in range(calls):
                call(index)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()  # the first replay uploads the graph
    return graph
