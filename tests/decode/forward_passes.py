"""Packed batches for the tests of what runs them: pools full of poison, prompts, references."""

from __future__ import annotations

import torch
from torch import nn

from pumice.decode import BlockManager, CachePool, ModelRunner, PagedBatch

VOCABULARY = 61


def poison(pool: CachePool) -> CachePool:
    """NaN in every slot: whatever is read without having been written shows."""
    for cache in (*pool.key_caches, *pool.value_caches):
        if cache.dtype == torch.int8:
            cache.fill_(127)
        else:
            cache.view(torch.uint8).fill_(0xFF)  # a NaN in every float type, float8 too
    return pool


def prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def runner_of(model: nn.Module, *, num_blocks: int = 60, block_size: int = 4, **options):
    runner = ModelRunner(model, num_blocks=num_blocks, block_size=block_size, **options)
    poison(runner.pool)
    manager = BlockManager(
        num_blocks, block_size, watermark=0.0, window_left=runner.geometry.window_left
    )
    return runner, manager


@torch.no_grad()
def alone(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    """The logits [n, V] of a sequence in an ordinary forward pass of its own."""
    return model(torch.tensor([tokens])).logits[0]


class Sequences:
    """Sequences that are fed to a runner piece by piece."""

    def __init__(self, runner: ModelRunner, manager: BlockManager, tokens: list[list[int]]) -> None:
        self.runner, self.manager, self.tokens = runner, manager, tokens
        self.ids = [manager.allocate(num_tokens=0).id for _ in tokens]
        self.done = [0] * len(tokens)

    def batch(self, *counts: int) -> PagedBatch:
        """The next counts[i] tokens of each sequence."""
        pieces = [
            row[done : done + n]
            for row, done, n in zip(self.tokens, self.done, counts, strict=True)
        ]
        self.done = [done + n for done, n in zip(self.done, counts, strict=True)]
        step = self.manager.append(self.ids, counts=list(counts))
        return PagedBatch.from_step(self.runner.pool, step, pieces)

    def forward(self, *counts: int) -> list[torch.Tensor]:
        """Their logits, sequence by sequence."""
        return list(self.runner.forward(self.batch(*counts)).split(list(counts)))
