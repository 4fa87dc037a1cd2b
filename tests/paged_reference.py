"""What a paged cache holds and what attention over it computes, from the formulas: the oracle.

Plain loops over tokens; nothing is shared with the code under test. Attention itself is that of
attention_reference.py over the keys that the block table names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import attention_reference


@dataclass(frozen=True)
class Cache:
    """A pair of caches with their scales, on the CPU."""

    key: Tensor  # [num_blocks, block_size, H_kv, D]
    value: Tensor
    k_scale: Tensor | None = None  # [1] or [H_kv]
    v_scale: Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.key.shape[1]


def tokens(stored: Tensor, scale: Tensor | None, table: Sequence[int], length: int) -> Tensor:
    """Tokens 0 … length - 1 of one sequence, [length, H_kv, D] in float64.

    A block that the table does not name (a negative entry) is one that nobody may see: NaN.
    """
    size = stored.shape[1]
    rows = []
    for j in range(length):
        block = table[j // size]
        if block < 0:
            rows.append(torch.full(stored.shape[2:], torch.nan, dtype=torch.float64))
        else:
            rows.append(stored[block, j % size].to(torch.float32).double())
    result = torch.stack(rows) if rows else torch.empty(0, *stored.shape[2:], dtype=torch.float64)
    return result if scale is None else result * scale.double()[:, None]


def tree_visible(tree: Tensor, queries: int, keys: int) -> Tensor:
    """[1, 1, S_q, S_k]: all before the queries, and of the queries what bool [S_q, …] says."""
    seen = torch.ones(queries, keys, dtype=torch.bool)
    for i in range(queries):
        for t in range(queries):
            j = keys - queries + t
            if j >= 0:
                seen[i, j] = tree[i, t]
    return seen[None, None]


def attention(
    query: Tensor,
    cache: Cache,
    table: Sequence[int],
    length: int,
    options: attention_reference.Options,
    *,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """out [S_q, H, D_v] and lse [H, S_q] of one sequence, query [S_q, H, D]."""
    queries = query.shape[0]
    key = tokens(cache.key, cache.k_scale, table, length)
    value = tokens(cache.value, cache.v_scale, table, length)
    mask = None if tree is None else tree_visible(tree, queries, length)
    # What no query sees has no part in the result, whatever it holds.
    seen = attention_reference.visible(options, 1, queries, length, mask)[0, 0].any(0)
    key, value = (torch.where(seen[:, None, None], x, 0.0) for x in (key, value))
    out, lse = attention_reference.attention(
        query[None], key[None], value[None], options,
        sinks=sinks, alibi_slopes=alibi_slopes, mask=mask, dtype=dtype,
    )  # fmt: skip
    return out[0], lse[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [T, H, D] with its first pairs turned by the angles of its rows; cos [T, D_rot / 2]."""
    pairs = cos.shape[1]
    result = x.clone()
    for p in range(pairs):
        first, second = (2 * p, 2 * p + 1) if interleaved else (p, p + pairs)
        a, b, c, s = x[..., first], x[..., second], cos[:, None, p], sin[:, None, p]
        result[..., first] = a * c - b * s
        result[..., second] = b * c + a * s
    return result


def stored(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """fp32 x [T, H, D] as a cache of `dtype` keeps it."""
    if scale is not None:
        x = x / scale[:, None]
    if dtype == torch.float8_e4m3fn:
        return x.clamp(-448, 448).to(dtype)
    if dtype == torch.int8:
        return x.nan_to_num(nan=0.0).clamp(-127, 127).round().to(dtype)
    return x.to(dtype)
