"""A model, its pool of cache blocks, and forward passes over packed batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pumice.decode.batch import PagedBatch
from pumice.decode.model import Geometry, PagedModel
from pumice.decode.pool import CachePool

__all__ = ["ModelRunner"]


class ModelRunner:
    """Runs a model over a paged cache::

        runner = ModelRunner(model, num_blocks=1000)
        manager = BlockManager(1000, runner.pool.block_size)
        a, b = manager.allocate(prompt).id, …
        step = manager.append([b], [token])        # or view, for new prompts and others together
        batch = PagedBatch.from_step(runner.pool, step, [[token]])
        logits = runner.forward(batch)

    Args:
        model: a model of transformers, or one with ``forward_paged``: :mod:`pumice.decode.model`.
            It stays as it is: its attention implementation and its mode are changed for the time
            of a call only (so it must not be used by another thread meanwhile).
        num_blocks, block_size, cache_dtype: of the pool that is made for the model.
        pool: one that is there, instead; the model's layers are the first of its layers.

    Attributes:
        pool: the caches. vocab_size: V of the logits. device: where batches go.
        geometry: the layers' shapes and windows.

    Raises:
        TypeError, NotImplementedError: a model of another kind.
        ValueError: neither or both of num_blocks and pool; a pool that does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_blocks: int | None = None,
        block_size: int = 16,
        cache_dtype: torch.dtype | None = None,
        pool: CachePool | None = None,
    ) -> None:
        self.paged_model = PagedModel(model)
        self.geometry: Geometry = self.paged_model.geometry
        if (pool is None) == (num_blocks is None):
            raise ValueError("ModelRunner: give either num_blocks, for a new pool, or pool")
        if pool is None:
            assert num_blocks is not None
            pool = CachePool.for_model(
                self.paged_model,
                num_blocks=num_blocks,
                block_size=block_size,
                cache_dtype=cache_dtype,
            )
        elif not pool.fits(self.geometry.layers, self.geometry.dtype, self.geometry.device):
            raise ValueError(
                f"ModelRunner: {pool} with layers {[tuple(layer) for layer in pool.layers]} for "
                f"keys of {str(pool.dtype)[6:]} does not fit {type(model).__name__}, whose layers "
                f"are {[tuple(layer) for layer in self.geometry.layers]} with keys of "
                f"{str(self.geometry.dtype)[6:]} on {self.geometry.device}"
            )
        self.pool = pool

    @property
    def model(self) -> nn.Module:
        return self.paged_model.model

    @property
    def vocab_size(self) -> int:
        return self.geometry.vocab_size

    @property
    def device(self) -> torch.device:
        return self.geometry.device

    def forward(self, batch: PagedBatch, rows: Tensor | None = None) -> Tensor:
        """The logits of a batch's tokens; its keys and values are in the pool afterwards.

        Args:
            batch: of this runner's pool.
            rows: int64 [R], indices of tokens in the batch (0 … T - 1), in any order: the head is
                run for these only. None: all.

        Returns:
            [R, V] in the model's dtype, made in inference mode.

        Raises:
            ValueError, TypeError: a batch of another pool, rows of another shape or dtype.
            IndexError: tokens beyond the vocabulary (on the CPU; a GPU stops with an assertion).
        """
        if batch.pool is not self.pool:
            raise ValueError(
                "ModelRunner.forward: the batch was made for another pool than this runner's"
            )
        if rows is not None:
            if rows.dtype != torch.int64:
                raise TypeError(
                    f"ModelRunner.forward: rows must be int64, not {str(rows.dtype)[6:]}"
                )
            if rows.dim() != 1:
                raise ValueError(
                    f"ModelRunner.forward: rows must have shape [R], not {list(rows.shape)}"
                )
            rows = rows.to(self.device)
        return self.paged_model.forward(batch, rows)
