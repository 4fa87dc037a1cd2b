"""Attention to keys and values that lie in blocks of a pool, and what fills the pool.

A cache is a pair of tensors ``key_cache`` [num_blocks, block_size, H_kv, D] and ``value_cache``
[num_blocks, block_size, H_kv, D_v]. Token j of sequence b lies in block ``block_table[b, j //
block_size]`` at slot ``j % block_size``: a sequence takes what blocks are free, in any order, and
two may share blocks (Kwon et al., 2023). :mod:`pumice.decode` keeps the books.

Elements are of the dtype of the query, or bytes that stand for ``stored · scale``: float8 e4m3 or
int8, with a scale for the whole cache or for each KV head.

On CUDA attention takes head dims up to 256. With queries of 16 bits rows of the caches lie on
boundaries of 16 bytes, a head dim is a multiple of 8 (16 where the cache is one of bytes). It
refuses others (RuntimeError).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from pumice.ops import _library
from pumice.ops import _paged_fakes as _paged_fakes
from pumice.ops._attention_checks import (
    check_alibi,
    check_count,
    check_flag,
    check_float,
    check_sinks,
    check_window,
)
from pumice.ops._checks import check_dtype, check_same_device, check_tensor, check_vector, shape_of
from pumice.ops._paged_checks import (
    check_caches,
    check_no_gradient,
    check_paged_query,
    check_rotary,
    check_scales,
    check_stored_dtype,
    check_table,
    check_tokens,
    check_tree_mask,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """Options of :func:`paged_attention`."""

    cu_seqlens_q: Tensor | None
    max_seqlen_q: int | None
    softmax_scale: float | None
    causal: bool
    window: tuple[int, int]
    sink_tokens: int
    sinks: Tensor | None
    softcap: float
    alibi_slopes: Tensor | None
    tree_mask: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None


@overload
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...


@overload
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    return_lse: bool,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]: ...


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`pumice.ops.flash_attention` to the keys and values of a paged cache.

    With S = block_size, g = h // (H / H_kv) and L = ``seq_lens[b]``, for j = 0 … L - 1::

        key[b, j] = k_scale[g] · key_cache[block_table[b, j // S], j % S, g]
        value[b, j] = v_scale[g] · value_cache[block_table[b, j // S], j % S, g]

    The queries of a sequence are its **last** tokens, whose keys are in the cache already: query i
    of n stands at position p = i + L - n. So one operator serves decoding (n = 1), chunks of a
    prompt (n many), both mixed in one packed batch, and the verification of drafted tokens. What a
    query sees, scores, the softmax and its end are those of flash attention; with a tree_mask
    query i sees query t of its own sequence only where that says so, and all that came before the
    queries (subject to causal and window, which count positions in the cache).

    Nothing past the end of a sequence is read: neither slots, which may hold NaN, nor entries of
    the table. Nor are those of blocks of which no query sees a token (window and sink_tokens),
    which may have been given back: any value, -1 say. A row's bits depend on its own sequence
    alone, not on the batch, the block_size or where the blocks lie; where the cache is of the
    query's dtype they are those of flash attention to the same keys.

    Args:
        query: fp32, fp16 or bf16 [B, S_q, H, D], or [total, H, D] with cu_seqlens_q; any strides.
        key_cache: the dtype of query, float8_e4m3fn or int8, [num_blocks, block_size, H_kv, D],
            H_kv a divisor of H; any strides but that of the last dimension, which is 1.
        value_cache: the dtype of key_cache, [num_blocks, block_size, H_kv, D_v].
        block_table: int32 [B, max_blocks].
        seq_lens: int32 [B], tokens of each sequence with those of its queries; 0 is allowed.
        cu_seqlens_q: int32 [B + 1], ascending: sequence b has the queries cu_seqlens_q[b] …
            cu_seqlens_q[b + 1] - 1. Rows of no sequence get out = 0 and lse = -inf.
        max_seqlen_q: no sequence has more queries; needed with cu_seqlens_q, else S_q.
        softmax_scale, causal, window, sink_tokens, sinks, softcap, alibi_slopes: as in
            :func:`pumice.ops.flash_attention` (causal by default; without it queries see each
            other, all of them).
        tree_mask: bool [B · S_q or total, max_seqlen_q], row by query: True at t where it sees
            query t of its sequence; or int32 [the same, ceil(max_seqlen_q / 32)], bit by bit.
        k_scale, v_scale: fp32 [1] or [H_kv], for a cache of bytes only.
        return_lse: return lse too.

    Returns:
        out [B, S_q, H, D_v] or [total, H, D_v] in the dtype of query, contiguous; with
        ``return_lse`` (out, lse), lse fp32 [B, H, S_q] or [H, total].

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value.
        RuntimeError: no kernels for the device of query; a gradient; on the CPU, lengths or blocks
            outside the table or the cache (CUDA does not look at them: lengths are cut at the
            table's, keys and values of such blocks are zero, no memory is touched); on CUDA, D or
            D_v above 256, and with queries of 16 bits rows of a cache that do not lie on
            boundaries of 16 bytes, or whose D or D_v is no multiple of 16 bytes.

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", 2023; Miao et al., "SpecInfer", 2024 (tree_mask).
    """
    op = "paged_attention"
    sizes = check_caches(op, key_cache, value_cache)
    packed = cu_seqlens_q is not None
    check_paged_query(op, query, sizes, packed)
    check_stored_dtype(op, "query", query, key_cache)
    batch = check_table(op, block_table, seq_lens, query)
    if cu_seqlens_q is not None:
        cu_seqlens_q = check_vector(
            op, "cu_seqlens_q", cu_seqlens_q, (batch + 1,), (torch.int32,), "query", query
        )
        if max_seqlen_q is None:
            raise ValueError(f"{op}: cu_seqlens_q needs max_seqlen_q, the most queries of one")
        check_count(op, "max_seqlen_q", max_seqlen_q)
    else:
        queries: int = query.shape[1]
        if query.shape[0] != batch:
            raise ValueError(
                f"{op}: query and seq_lens must have one batch size, but their shapes are "
                f"{shape_of(query)} and {shape_of(seq_lens)}"
            )
        if max_seqlen_q is not None and max_seqlen_q != queries:
            raise ValueError(
                f"{op}: max_seqlen_q is {max_seqlen_q}, but each sequence of query has {queries}; "
                "it goes with cu_seqlens_q"
            )
        max_seqlen_q = queries
    k_scale, v_scale = check_scales(op, k_scale, v_scale, key_cache)
    if softmax_scale is None:
        softmax_scale = query.shape[-1] ** -0.5
    else:
        check_float(op, "softmax_scale", softmax_scale)
    check_float(op, "softcap", softcap, at_least=0)
    check_flag(op, "causal", causal)
    left, right = check_window(op, window)
    check_count(op, "sink_tokens", sink_tokens)
    heads = query.shape[-2]
    if sinks is not None:
        sinks = check_sinks(op, sinks, heads, query)
    if alibi_slopes is not None:
        alibi_slopes = check_alibi(op, alibi_slopes, batch, heads, query)
    if tree_mask is not None:
        rows = query.shape[0] if packed else batch * max_seqlen_q
        tree_mask = check_tree_mask(op, tree_mask, rows, max_seqlen_q, query)
    out, lse = _library.ops.paged_attention(
        query,
        key_cache,
        value_cache,
        block_table.contiguous(),
        seq_lens.contiguous(),
        cu_seqlens_q,
        sinks,
        alibi_slopes,
        tree_mask,
        k_scale,
        v_scale,
        max_seqlen_q=max_seqlen_q,
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=left,
        window_right=right,
        sink_tokens=sink_tokens,
        softcap=softcap,
    )
    return (out, lse) if return_lse else out


def cache_append(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    rotary: tuple[Tensor, Tensor, Tensor] | None = None,
    interleaved: bool = False,
) -> None:
    """Write tokens into a paged cache, in place: rotated and quantized on the way.

    With slot = ``slot_mapping[t]`` and S = block_size::

        key_cache[slot // S, slot % S, g] = store(rotate(key[t, g]), k_scale[g])
        value_cache[slot // S, slot % S, g] = store(value[t, g], v_scale[g])

    A negative slot skips its token (padding of a batch). Slots given twice: one of the tokens, not
    said which.

    rotate, in fp32, turns the pairs (a, b) of the first D_rot elements by the angles of row
    positions[t], (a·cos - b·sin, b·cos + a·sin): the pairs are elements p and p + D_rot/2
    (GPT-NeoX, Llama), or 2p and 2p + 1 with ``interleaved`` (GPT-J). The result is rounded once.

    store of float8_e4m3fn is clamp(x / scale, ±448) to the nearest, ties to even, NaN stays NaN
    (torch's ``.to(torch.float8_e4m3fn)`` of the clamped value); of int8 clamp(rint(x / scale),
    ±127), NaN becomes 0; of the dtype of key, x.

    Args:
        key: fp32, fp16 or bf16 [T, H_kv, D]; any strides.
        value: the dtype of key, [T, H_kv, D_v].
        key_cache, value_cache: as in :func:`paged_attention`; of key's dtype, or bytes.
        slot_mapping: int64 [T], block · block_size + offset.
        k_scale, v_scale: fp32 [1] or [H_kv], for a cache of bytes only.
        rotary: (cos, sin, positions): cos and sin [max_position, D_rot / 2], fp32 or 16 bit, D_rot
            ≤ D; positions int32 or int64 [T]. None: no rotation.
        interleaved: which elements are pairs.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: no kernels for the device; key or value require a gradient where gradients are
            on; on the CPU, before anything is written, a slot beyond the cache or a position
            beyond cos (CUDA, which does not look at them, skips such tokens).

    Source: Su et al., "RoFormer", 2021; Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
    """
    op = "cache_append"
    sizes = check_caches(op, key_cache, value_cache)
    tokens = check_tokens(op, key, value, sizes)
    check_stored_dtype(op, "key", key, key_cache)
    check_no_gradient(op, key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    slots = check_vector(
        op, "slot_mapping", slot_mapping, (tokens,), (torch.int64,), "key_cache", key_cache
    )
    k_scale, v_scale = check_scales(op, k_scale, v_scale, key_cache)
    check_flag(op, "interleaved", interleaved)
    cos = sin = positions = None
    if rotary is not None:
        cos, sin, positions = check_rotary(op, rotary, tokens, sizes.dim, key)
    _library.ops.cache_append(
        key, value, key_cache, value_cache, slots, k_scale, v_scale, cos, sin, positions,
        interleaved=interleaved,
    )  # fmt: skip


def cache_copy_blocks(key_cache: Tensor, value_cache: Tensor, pairs: Tensor) -> None:
    """Copy whole blocks of both caches, in place: ``cache[pairs[n, 1]] = cache[pairs[n, 0]]``.

    What copy-on-write asks for when a sequence is forked. A pair with a negative source is skipped.
    No destination may occur twice, or be the source of another pair.

    Args:
        key_cache, value_cache: as in :func:`paged_attention`.
        pairs: int64 [n, 2] of (source, destination), on the device of the caches.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: no kernels for the device; a cache requires a gradient where gradients are
            on; on the CPU, before anything is written, a block outside the cache, or pairs that
            overlap (CUDA does not look at them: such blocks are skipped, overlaps unspecified).
    """
    op = "cache_copy_blocks"
    check_caches(op, key_cache, value_cache)
    check_no_gradient(op, key_cache=key_cache, value_cache=value_cache)
    check_tensor(op, "pairs", pairs)
    check_dtype(op, "pairs", pairs, (torch.int64,))
    check_same_device(op, "pairs", pairs, "key_cache", key_cache)
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{op}: pairs must have shape [n, 2], not {shape_of(pairs)}")
    _library.ops.cache_copy_blocks(key_cache, value_cache, pairs.contiguous())
