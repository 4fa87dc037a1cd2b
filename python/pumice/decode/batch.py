"""One forward pass over many sequences: their new tokens end to end, and where their caches lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pumice.ops.paged import cache_append, paged_attention

if TYPE_CHECKING:
    from typing_extensions import Self

    from pumice.decode.block_manager import Step
    from pumice.decode.pool import CachePool

__all__ = ["PagedBatch"]


@dataclass
class PagedBatch:
    """T new tokens of B sequences: prompts, chunks of prompts, single tokens, drafts, mixed.

    Nothing is padded: a batch of one prompt of 300 tokens and 20 sequences that each decode one
    has T = 320. Sequence b's tokens are ``cu_seqlens_q[b]`` … ``cu_seqlens_q[b + 1] - 1``, the last
    of its ``seq_lens[b]`` tokens; the keys and values of the earlier ones are in the pool.

    A model runs every layer's attention by :meth:`attend`, and needs to know nothing else.

    Attributes:
        input_ids, positions: int64 [T].
        slot_mapping: int64 [T], where in the pool the new keys and values go.
        block_table: int32 [B, w]. seq_lens: int32 [B]. cu_seqlens_q: int32 [B + 1].
        max_seqlen_q: the most new tokens of one sequence.
        pool: the caches.
        tree_mask: bool [T, max_seqlen_q], or bits: token t sees new token j of its sequence; None:
            the new tokens are a chain.
        attended: the layers that have run, in order. Kept by :meth:`attend`.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    pool: CachePool
    tree_mask: Tensor | None = None
    attended: list[int] = field(default_factory=list)

    @classmethod
    def from_step(
        cls,
        pool: CachePool,
        step: Step,
        tokens: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]] | None = None,
        tree_mask: Tensor | None = None,
    ) -> Self:
        """The batch of a block manager's :class:`~pumice.decode.Step`; copies its blocks.

        Args:
            pool: where the manager's blocks are.
            step: what ``append`` or ``view`` returned for B sequences. ``step.copies`` is carried
                out here (again is harmless).
            tokens: for each sequence its tokens in this pass, the last ones of it; as many as the
                step has slots for. A sequence may have none.
            positions: for each token its position; by default each sequence's last ones. Tokens of
                a tree have the position of their depth.
            tree_mask: see above.

        Raises:
            ValueError: no tokens at all; tokens that are not those of the step.
        """
        counts = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
        total = int(counts.sum())
        if positions is None:
            at = np.arange(total) + np.repeat(step.seq_lens - np.cumsum(counts), counts)
        else:
            if [len(row) for row in positions] != counts.tolist():
                raise ValueError(
                    "PagedBatch: positions must have one number for each of tokens, not "
                    f"{[len(row) for row in positions]} for {counts.tolist()}"
                )
            at = _flat(positions, total)
        return cls.from_arrays(pool, step, counts, _flat(tokens, total), at, tree_mask)

    @classmethod
    def from_arrays(
        cls,
        pool: CachePool,
        step: Step,
        counts: npt.NDArray[np.int64],
        input_ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        tree_mask: Tensor | None = None,
    ) -> Self:
        """:meth:`from_step` of arrays: ``counts[b]`` tokens of sequence b, end to end."""
        total = len(input_ids)
        cls._check(pool, step, counts, total)
        pool.copy_blocks(step.copies)
        starts = np.concatenate([[0], np.cumsum(counts)])
        # Two transfers, not six: on a GPU each has its own latency.
        per_token = _upload(
            np.concatenate([input_ids, positions, step.slot_mapping]), np.int64, pool.device
        )
        table = step.block_table
        per_sequence = _upload(
            np.concatenate([step.seq_lens, starts, table.ravel()]), np.int32, pool.device
        )
        batch = len(counts)
        return cls(
            input_ids=per_token[:total],
            positions=per_token[total : 2 * total],
            slot_mapping=per_token[2 * total :],
            block_table=per_sequence[2 * batch + 1 :].view(batch, table.shape[1]),
            seq_lens=per_sequence[:batch],
            cu_seqlens_q=per_sequence[batch : 2 * batch + 1],
            max_seqlen_q=int(counts.max()),
            pool=pool,
            tree_mask=None if tree_mask is None else tree_mask.to(pool.device),
        )

    @staticmethod
    def _check(pool: CachePool, step: Step, counts: npt.NDArray[np.int64], total: int) -> None:
        if total == 0:
            raise ValueError("PagedBatch: a forward pass needs at least one token, got none")
        if len(counts) != len(step.seq_lens) or total != len(step.slot_mapping):
            raise ValueError(
                f"PagedBatch: the step is one of {len(step.slot_mapping)} tokens of "
                f"{len(step.seq_lens)} sequences, but tokens holds {total} of {len(counts)}"
            )
        if (counts > step.seq_lens).any():
            raise ValueError(
                "PagedBatch: a sequence has more tokens in this pass than in all: "
                f"{counts.tolist()} of {step.seq_lens.tolist()}"
            )
        highest = int(step.slot_mapping.max())
        if highest >= pool.num_blocks * pool.block_size:
            raise ValueError(
                f"PagedBatch: the step writes to slot {highest}, but the pool has {pool.num_blocks}"
                f" blocks of {pool.block_size}; was it made by another pool's block manager?"
            )

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        softmax_scale: float | None = None,
        window: tuple[int, int] = (-1, -1),
        sinks: Tensor | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """Write a layer's new keys and values into the pool; attention of its queries.

        Args:
            layer_idx: 0 for the model's first layer.
            query: [T, H, D]. key: [T, H_kv, D]. value: [T, H_kv, D_v]. Rotated, if they are to be.
            softmax_scale, window, sinks, softcap: as in :func:`pumice.ops.paged_attention`, which
                is causal here.

        Returns:
            [T, H, D_v].
        """
        if not 0 <= layer_idx < len(self.pool.layers):
            raise ValueError(
                f"PagedBatch.attend: layer {layer_idx}, but the pool has {len(self.pool.layers)} "
                "layers; it was made for another model"
            )
        self.attended.append(layer_idx)
        self.append(layer_idx, key, value)
        return self.attention(
            layer_idx, query, softmax_scale=softmax_scale, window=window, sinks=sinks,
            softcap=softcap,
        )  # fmt: skip

    def append(self, layer_idx: int, key: Tensor, value: Tensor) -> None:
        """Write a layer's new keys and values."""
        pool = self.pool
        k_scale, v_scale = pool.scales(layer_idx)
        cache_append(
            key,
            value,
            pool.key_caches[layer_idx],
            pool.value_caches[layer_idx],
            self.slot_mapping,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    def attention(
        self,
        layer_idx: int,
        query: Tensor,
        *,
        softmax_scale: float | None,
        window: tuple[int, int],
        sinks: Tensor | None,
        softcap: float,
    ) -> Tensor:
        """Attention of a layer's queries to what is in the pool, the new tokens included."""
        pool = self.pool
        k_scale, v_scale = pool.scales(layer_idx)
        return paged_attention(
            query,
            pool.key_caches[layer_idx],
            pool.value_caches[layer_idx],
            self.block_table,
            self.seq_lens,
            cu_seqlens_q=self.cu_seqlens_q,
            max_seqlen_q=self.max_seqlen_q,
            softmax_scale=softmax_scale,
            window=window,
            sinks=sinks,
            softcap=softcap,
            tree_mask=self.tree_mask,
            k_scale=k_scale,
            v_scale=v_scale,
        )


def _flat(rows: Sequence[Sequence[int]], total: int) -> npt.NDArray[np.int64]:
    return np.fromiter((item for row in rows for item in row), dtype=np.int64, count=total)


def _upload(
    numbers: npt.NDArray[np.int64], dtype: type[np.generic], device: torch.device
) -> Tensor:
    tensor = torch.from_numpy(numbers.astype(dtype, copy=False))
    if device.type == "cuda":  # from pinned memory the copy does not wait for the kernels before it
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
