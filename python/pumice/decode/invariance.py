"""Whether a model's results depend on where in a batch a token stands.

With all passes of one size, nothing else can change them: every matrix product, norm and activation
gets the same shapes, and so the same kernel, which sums in the same order whatever the other rows
hold. What remains is that a kernel may treat rows differently by place: at the edge of its tiles,
where it deals rows out to threads, or (a mixture of experts) where tokens are sorted into groups of
other sizes. That cannot be known for every machine, so it is tried.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pumice.decode.batch import PagedBatch
from pumice.decode.block_manager import BlockManager
from pumice.decode.packing import pack
from pumice.decode.runner import ModelRunner
from pumice.decode.scheduler import Plan

__all__ = ["check_batch_invariance"]


def check_batch_invariance(runner: ModelRunner, size: int) -> None:
    """Raise RuntimeError unless logits have the same bits wherever in passes of ``size`` they are.

    One token is put at every place of a pass; some are run alone, behind others, and in pieces.
    The pool must be unused.
    """
    chance = random.Random(0)

    def some(count: int) -> list[int]:
        return [chance.randrange(runner.vocab_size) for _ in range(count)]

    for token in some(3):
        everywhere = _at_every_place(runner, size, token)
        _compare(everywhere[:1], everywhere, f"a token at every place of {size}", runner)
    slots = runner.pool.num_blocks * runner.pool.block_size
    probe = some(max(1, min(size, slots // 2) // 2))
    rest = min(size, slots // 2) - len(probe)
    alone = _after(runner, size, [probe])
    for before in sorted({1, rest // 2, rest} - {0}):
        found = _after(runner, size, [probe], some(before))
        _compare(alone, found, f"{len(probe)} tokens behind {before} others", runner)
    for cut in sorted({1, len(probe) // 2, len(probe) - 1} - {0, len(probe)}):
        found = _after(runner, size, [probe[:cut], probe[cut:]], some(min(3, rest)))
        _compare(alone, found, f"{cut} tokens and {len(probe) - cut} in another pass", runner)


def _compare(expected: Tensor, found: Tensor, what: str, runner: ModelRunner) -> None:
    rows = expected.expand_as(found)
    if not torch.equal(_bits(rows), _bits(found)):
        worst = (rows.float() - found.float()).abs().max().item()
        raise RuntimeError(
            f"batch_invariant: the logits of {type(runner.model).__name__} depend on the place in "
            f"the batch: {what}: they differ by up to {worst:.2g}. Try another max_batch_tokens (a "
            "multiple of 16 times the number of threads) or dtype, or do without"
        )


def _at_every_place(runner: ModelRunner, size: int, token: int) -> Tensor:
    """The logits of passes of ``size`` sequences that are one and the same token: [size, V].

    They all write the same into one slot of the cache.
    """
    device = runner.device
    zeros = torch.zeros(size, dtype=torch.int64, device=device)
    ones = torch.ones(size, dtype=torch.int32, device=device)
    ends = torch.arange(size + 1, dtype=torch.int32, device=device)
    batch = PagedBatch(
        zeros + token, zeros, zeros, zeros[:, None].int(), ones, ends, 1, runner.pool
    )
    return runner.forward(batch, torch.arange(size, device=device))


def _after(
    runner: ModelRunner, size: int, pieces: Sequence[list[int]], before: Sequence[int] = ()
) -> Tensor:
    """The logits [1, V] after a sequence that comes in pieces, each behind another sequence."""
    pool = runner.pool
    manager = BlockManager(pool.num_blocks, pool.block_size, prefix_caching=False, watermark=0)
    sequence = manager.allocate([]).id
    logits = torch.empty(0)
    for piece in pieces:
        sequences, counts = [sequence], [len(piece)]
        if before:
            sequences, counts = [manager.allocate([]).id, sequence], [len(before), len(piece)]
        tokens = np.array([*before, *piece], np.int64)
        step = manager.append(sequences, tokens, counts)
        numbers = np.array(counts, np.int64)
        plan = Plan([], np.array(sequences), numbers, 0 * numbers, tokens, step)
        rows = torch.full((size,), len(tokens) - 1, device=runner.device)
        logits = runner.forward(pack(plan, pool, size), rows)
        if before:
            manager.free(sequences[0])
    return logits[:1].clone()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
