"""Shapes of the paged cache's operators, for torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.ops import _library


def _attention_fake(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    *others: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:-1], value_cache.shape[-1]))
    queries, heads = query.shape[-3:-1]
    leading = query.shape[:1] if cu_seqlens_q is None else ()
    return out, query.new_empty((*leading, heads, queries), dtype=torch.float32)


def _writes(*tensors: Tensor | None, **options: Any) -> None:
    """Nothing is returned."""


_library.declare(
    "paged_attention",
    fake=_attention_fake,
    backward=_library.not_differentiable(
        "paged_attention",
        "A cache is for inference; flash_attention and flash_attention_varlen have gradients.",
    ),
)
_library.declare("cache_append", fake=_writes, backward=None)
_library.declare("cache_copy_blocks", fake=_writes, backward=None)
