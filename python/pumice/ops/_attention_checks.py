"""Checks of the arguments of attention, and their forms as the operators take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pumice.ops._checks import (
    FLOATING,
    check_dtype,
    check_kernels,
    check_same_device,
    check_tensor,
    check_vector,
    shape_of,
)

# Sequences are shorter (csrc/common/attention_mask.h), so that sums of positions fit an int32.
SEQUENCE_LIMIT = 1 << 29
# No position: beyond every sequence, and small enough to add the length of one to.
NO_POSITION = 1 << 30
# The widest head of the CUDA kernels; the CPU kernels take any.
CUDA_HEAD_DIM = 256

INDEX = (torch.int32, torch.int64)


def is_int(value: Any) -> bool:
    """Or symbolic, as sizes can be under torch.compile and torch.export."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def written(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


class Sizes(NamedTuple):
    """B, H, S_q and S_k of a call."""

    batch: int
    heads: int
    queries: int  # in all where packed
    keys: int


def check_qkv(op: str, query: Any, key: Any, value: Any, packed: bool) -> Sizes:
    """query [B, S_q, H, D], key [B, S_k, H_kv, D], value [B, S_k, H_kv, D_v], any strides.

    Without the batch where packed, whose size is then 0 in the result.
    """
    check_tensor(op, "query", query)
    check_dtype(op, "query", query, FLOATING)
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(op, name, tensor)
        check_dtype(op, name, tensor, (query.dtype,))
        check_same_device(op, name, tensor, "query", query)
    check_kernels(op, query)
    # Each shape is asked for once: a call that decodes one token is a few microseconds in all.
    shapes = (query.shape, key.shape, value.shape)
    for name, shape in zip(("query", "key", "value"), shapes, strict=True):
        if len(shape) != (3 if packed else 4):
            form = "[total, heads, dim]" if packed else "[batch, sequence, heads, dim]"
            raise ValueError(f"{op}: {name} must have shape {form}, not {written(shape)}")
    *batches, queries, heads, head_dim = shapes[0]
    *key_batches, keys, kv_heads, key_dim = shapes[1]
    *value_batches, value_keys, value_heads, value_dim = shapes[2]
    if head_dim < 1 or heads < 1:
        raise ValueError(
            f"{op}: query must have at least one head, of at least one dimension, not shape "
            f"{written(shapes[0])}"
        )
    if key_dim != head_dim:
        raise ValueError(
            f"{op}: the head dim of key must be that of query, {head_dim}, but key has shape "
            f"{written(shapes[1])}"
        )
    if kv_heads < 1 or heads % kv_heads != 0:
        raise ValueError(
            f"{op}: the heads of query must be a multiple of those of key (one or more query heads "
            f"for each KV head), but query has {heads} and key has {kv_heads}"
        )
    if (
        value_keys != keys
        or value_heads != kv_heads
        or value_batches != key_batches
        or value_dim < 1
    ):
        raise ValueError(
            f"{op}: value must have the shape of key {written(shapes[1])} but for its last "
            f"dimension, at least 1, not {written(shapes[2])}"
        )
    if batches != key_batches:
        raise ValueError(
            f"{op}: query and key must have one batch size, but their shapes are "
            f"{written(shapes[0])} and {written(shapes[1])}"
        )
    if not packed and (queries >= SEQUENCE_LIMIT or keys >= SEQUENCE_LIMIT):
        raise ValueError(
            f"{op}: sequences must be shorter than 2^29, but query has {queries} tokens and key "
            f"has {keys}"
        )
    if query.is_cuda and (head_dim > CUDA_HEAD_DIM or value_dim > CUDA_HEAD_DIM):
        raise ValueError(
            f"{op}: on CUDA the head dims of query and value can be at most {CUDA_HEAD_DIM}, not "
            f"{head_dim} and {value_dim}; the CPU takes any"
        )
    return Sizes(batches[0] if batches else 0, heads, queries, keys)


def check_cu_seqlens(op: str, cu_seqlens_q: Any, cu_seqlens_k: Any, query: Tensor) -> int:
    """int32 [B + 1] both; returns B. Their values are the kernels' business: no synchronization."""
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(op, name, tensor)
        check_dtype(op, name, tensor, (torch.int32,))
        check_same_device(op, name, tensor, "query", query)
        if tensor.dim() != 1 or tensor.shape[0] < 1:
            raise ValueError(f"{op}: {name} must have shape [B + 1], not {shape_of(tensor)}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_q and cu_seqlens_k must have one shape [B + 1], not "
            f"{shape_of(cu_seqlens_q)} and {shape_of(cu_seqlens_k)}"
        )
    batch: int = cu_seqlens_q.shape[0] - 1
    return batch


def check_count(op: str, name: str, count: Any) -> None:
    """An int in [0, 2^29)."""
    if not is_int(count):
        raise TypeError(f"{op}: {name} must be an int, not {type(count).__name__}")
    if count < 0 or count >= SEQUENCE_LIMIT:
        raise ValueError(f"{op}: {name} must be in [0, 2^29), not {count}")


def check_window(op: str, window: Any) -> tuple[int, int]:
    """Keys before and after a query's position; -1: no bound."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(
            f"{op}: window must be a pair of ints (left, right), -1 for no bound, not {window!r}"
        )
    for side in window:
        if not is_int(side):
            raise TypeError(
                f"{op}: window must be a pair of ints (left, right), not of {type(side).__name__}"
            )
        if side < -1:
            raise ValueError(f"{op}: a side of window must be at least -1 (no bound), not {side}")
    left, right = window
    return left, right


def check_float(op: str, name: str, value: Any, at_least: float | None = None) -> None:
    """A finite number, not below at_least."""
    if isinstance(value, torch.SymFloat):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a float, not {type(value).__name__}")
    if not -math.inf < value < math.inf:  # not math.isfinite, which torch.compile cannot trace
        raise ValueError(f"{op}: {name} must be finite, not {value}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{op}: {name} must not be below {at_least:g}, not {value}")


def check_flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, not {type(value).__name__}")


def check_sinks(op: str, sinks: Any, heads: int, query: Tensor) -> Tensor:
    return check_vector(op, "sinks", sinks, (heads,), FLOATING, "query", query).float()


def check_alibi(op: str, slopes: Any, batch: int, heads: int, query: Tensor) -> Tensor:
    check_tensor(op, "alibi_slopes", slopes)
    check_dtype(op, "alibi_slopes", slopes, FLOATING)
    check_same_device(op, "alibi_slopes", slopes, "query", query)
    if slopes.shape != (heads,) and slopes.shape != (batch, heads):
        raise ValueError(
            f"{op}: alibi_slopes must have shape [{heads}] or [{batch}, {heads}], not "
            f"{shape_of(slopes)}"
        )
    if slopes.requires_grad:
        raise ValueError(
            f"{op}: alibi_slopes requires a gradient, but has none here: slopes are constants "
            "(Press, Smith, Lewis, 2021); detach it"
        )
    contiguous: Tensor = slopes.float().contiguous()
    return contiguous


def global_positions(
    op: str, global_tokens: Any, batch: int, query: Tensor
) -> tuple[int, Tensor | None]:
    """How many tokens from the start are global, and an index of others (None: none).

    The index is int32 [G] or [B, G], ascending, padded at its end by NO_POSITION.
    """
    if is_int(global_tokens):
        check_count(op, "global_tokens", global_tokens)
        return global_tokens, None
    if isinstance(global_tokens, Tensor):
        check_dtype(op, "global_tokens", global_tokens, INDEX)
        check_same_device(op, "global_tokens", global_tokens, "query", query)
        shape = global_tokens.shape
        if len(shape) != 1 and (len(shape) != 2 or shape[0] != batch):
            raise ValueError(
                f"{op}: global_tokens must have shape [G] or [{batch}, G], not "
                f"{shape_of(global_tokens)}"
            )
        index = torch.where(global_tokens < 0, NO_POSITION, global_tokens)
        return 0, index.clamp(max=NO_POSITION).int().sort(-1).values.contiguous()
    if isinstance(global_tokens, Sequence) and not isinstance(global_tokens, (str, bytes)):
        for position in global_tokens:
            check_count(op, "a position in global_tokens", position)
        if len(global_tokens) == 0:
            return 0, None
        positions = sorted(set(global_tokens))
        return 0, torch.tensor(positions, dtype=torch.int32, device=query.device)
    raise TypeError(
        f"{op}: global_tokens must be an int (so many tokens from the start), or positions: a "
        f"sequence of ints or an int32 or int64 tensor, not {type(global_tokens).__name__}"
    )


def check_parts(op: str, outs: Any, lses: Any) -> None:
    """outs [P, B, S, H, D] and fp32 lses [P, B, H, S], P >= 1."""
    check_tensor(op, "outs", outs)
    check_dtype(op, "outs", outs, FLOATING)
    check_tensor(op, "lses", lses)
    check_dtype(op, "lses", lses, (torch.float32,))
    check_same_device(op, "lses", lses, "outs", outs)
    check_kernels(op, outs)
    if outs.dim() != 5 or outs.shape[0] < 1 or outs.shape[-1] < 1:
        raise ValueError(
            f"{op}: outs must have shape [P, B, S, H, D] with P, D >= 1, not {shape_of(outs)}"
        )
    parts, batch, length, heads, _ = outs.shape
    if lses.shape != (parts, batch, heads, length):
        raise ValueError(
            f"{op}: lses must have shape [{parts}, {batch}, {heads}, {length}], [P, B, H, S] of "
            f"outs {shape_of(outs)}, not {shape_of(lses)}"
        )
