"""Exact attention without a matrix of scores in memory: dense, packed, and in parts.

One description of what a query sees serves all masks (``csrc/common/attention_mask.h``). Query i of
a sequence of S_q queries and S_k keys stands at position p = i + S_k - S_q among the keys, the last
query at the last key ("bottom-right", as FlashAttention has it), and sees key j if::

    j ≤ p                                                          with causal, and
    mask[b, h, i, j]                                               with a mask, and
    j ≤ p + right and (j ≥ p - left or j < sink_tokens),           with a window (left, right),
        or j is global, or p is global

Blocks of keys that no query of a tile sees are never read, and blocks that all see are not tested
element by element: time is in proportion to the area that a mask leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, overload

from torch import Tensor

from pumice.ops import _attention_autograd as _attention_autograd
from pumice.ops import _library
from pumice.ops._attention_checks import (
    check_alibi,
    check_count,
    check_cu_seqlens,
    check_flag,
    check_float,
    check_parts,
    check_qkv,
    check_sinks,
    check_window,
    global_positions,
)
from pumice.ops.attention_mask import PackedMask, packed_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

GlobalTokens = int | Sequence[int] | Tensor


class Options(TypedDict, total=False):
    """Options of both forms of attention; see :func:`flash_attention`."""

    softmax_scale: float | None
    causal: bool
    window: tuple[int, int]
    sink_tokens: int
    global_tokens: GlobalTokens
    sinks: Tensor | None
    softcap: float
    alibi_slopes: Tensor | None


class DenseOptions(Options, total=False):
    mask: Tensor | PackedMask | None


class PackedOptions(Options):
    max_seqlen_q: int
    max_seqlen_k: int


@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[DenseOptions],
) -> Tensor: ...


@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[DenseOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool,
    **options: Unpack[DenseOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    global_tokens: GlobalTokens = 0,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | PackedMask | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to the keys it sees.

    With p and the visible keys j as in :mod:`pumice.ops.attention`, KV head g = h // (H / H_kv)::

        score[i, j] = softcap · tanh(softmax_scale · query[i]·key[j] / softcap)   (plain without)
                      - alibi_slopes[h] · |p - j|
        lse[i] = ln(Σ_j exp(score[i, j]) + exp(sinks[h]))
        out[i] = Σ_j exp(score[i, j] - lse[i]) · value[j]

    A query that sees no key gets out = 0 and lse = -inf (the sink's logit with ``sinks``). NaN and
    ±Inf in a key or value reach only the queries that see it. Scores and sums are fp32; in 16 bit
    the softmax's weights are rounded to the dtype of value before the product with it.

    The bits of a row of out depend on its own sequence's operands and lengths, on H, H_kv, D, D_v,
    the options and the device only: not on the batch, nor on the number of threads, and repeat.
    Memory beside out and lse is O(S), a mask's bits aside.

    Differentiable in query, key, value and sinks, through out and lse, deterministically (finite
    operands); once.

    Args:
        query: fp32, fp16 or bf16 [B, S_q, H, D]; any strides; any size may be 0 but H and D.
        key: the dtype of query, [B, S_k, H_kv, D], H_kv a divisor of H.
        value: the dtype of query, [B, S_k, H_kv, D_v]. On CUDA D and D_v can be up to 256.
        softmax_scale: what products are multiplied by; None: 1/√D.
        causal: no key after the query's position.
        window: keys seen (before, after) the query's position, itself beside them; -1: all.
        sink_tokens: so many keys from the start are seen from beyond the left edge of the window
            (StreamingLLM).
        global_tokens: positions that see and are seen by all, the window aside (Longformer): so
            many from the start, or a list, or an int32 or int64 tensor [G] or [B, G], padded by -1
            (not one synchronization; sorted in each call). Without a window all see all anyway.
        sinks: fp32, fp16 or bf16 [H], a logit for each head that takes part in the softmax's sum
            alone (gpt-oss); -inf: none.
        softcap: bound of the scores' magnitude before ALiBi; 0: none.
        alibi_slopes: fp32, fp16 or bf16 [H] or [B, H].
        mask: bool, broadcastable to [B, H, S_q, S_k], True where a query may see a key; or one
            that :func:`pumice.ops.pack_attention_mask` packed, which saves that in later calls.
        return_lse: return lse too.

    Returns:
        out of shape [B, S_q, H, D_v] and the dtype of query, contiguous; with ``return_lse`` (out,
        lse), lse fp32 [B, H, S_q], a natural logarithm.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value;
            alibi_slopes that require a gradient.
        RuntimeError: no kernels for the device of query, or a gradient of a gradient.

    Source: Dao, "FlashAttention-2", 2023; Beltagy, Peters, Cohan, "Longformer", 2020 (window and
    global tokens); Xiao, Tian, Chen, Han, Lewis, "Efficient Streaming Language Models with
    Attention Sinks", 2023 (sink_tokens); OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025
    (sinks); Press, Smith, Lewis, "Train Short, Test Long", 2021 (ALiBi); Gemma Team, "Gemma 2",
    2024 (softcap).
    """
    op = "flash_attention"
    batch, heads, queries, keys = check_qkv(op, query, key, value, packed=False)
    bits = blocks = None
    if mask is not None:
        bits, blocks, _ = packed_for(op, mask, batch, heads, queries, keys, query)
    return _attend(
        op, query, key, value, None, None, bits, blocks, batch, 0, 0, softmax_scale, causal,
        window, sink_tokens, global_tokens, sinks, softcap, alibi_slopes, return_lse,
    )  # fmt: skip


@overload
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[PackedOptions],
) -> Tensor: ...


@overload
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[PackedOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    return_lse: bool,
    **options: Unpack[PackedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...


def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    sink_tokens: int = 0,
    global_tokens: GlobalTokens = 0,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`flash_attention` of sequences of different lengths, one after the other, no padding.

    Sequence b has the queries cu_seqlens_q[b] … cu_seqlens_q[b + 1] - 1, and keys likewise; either
    may be none. Its rows have the bits that :func:`flash_attention` gives them alone. Rows of query
    that no sequence has (before the first and after the last) get out = 0 and lse = -inf.

    Args:
        query: fp32, fp16 or bf16 [total_q, H, D]; any strides.
        key: the dtype of query, [total_k, H_kv, D].
        value: the dtype of query, [total_k, H_kv, D_v].
        cu_seqlens_q: int32 [B + 1], ascending, on the device of query.
        cu_seqlens_k: the same for key and value.
        max_seqlen_q: no sequence has more queries. It decides how much is launched, not the result.
        max_seqlen_k: no sequence has more keys.
        softmax_scale, causal, window, sink_tokens, global_tokens, sinks, softcap, alibi_slopes,
            return_lse: see :func:`flash_attention`; positions count from each sequence's start.

    Returns:
        out of shape [total_q, H, D_v] and the dtype of query, contiguous; with ``return_lse`` (out,
        lse), lse fp32 [H, total_q].

    Raises:
        TypeError, ValueError, RuntimeError: see :func:`flash_attention`. cu_seqlens that do not
            fit the other arguments are refused on the CPU (RuntimeError); CUDA does not look.
    """
    op = "flash_attention_varlen"
    check_qkv(op, query, key, value, packed=True)
    batch = check_cu_seqlens(op, cu_seqlens_q, cu_seqlens_k, query)
    for name, length in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        check_count(op, name, length)
    return _attend(
        op, query, key, value, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), None, None,
        batch, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window, sink_tokens,
        global_tokens, sinks, softcap, alibi_slopes, return_lse,
    )  # fmt: skip


def _attend(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    bits: Tensor | None,
    blocks: Tensor | None,
    batch: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    window: tuple[int, int],
    sink_tokens: int,
    global_tokens: GlobalTokens,
    sinks: Tensor | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The options, checked, and the call."""
    heads = query.shape[-2]
    if softmax_scale is None:
        softmax_scale = query.shape[-1] ** -0.5
    else:
        check_float(op, "softmax_scale", softmax_scale)
    check_float(op, "softcap", softcap, at_least=0)
    check_flag(op, "causal", causal)
    left, right = check_window(op, window)
    check_count(op, "sink_tokens", sink_tokens)
    first, index = global_positions(op, global_tokens, batch, query)
    if sinks is not None:
        sinks = check_sinks(op, sinks, heads, query)
    if alibi_slopes is not None:
        alibi_slopes = check_alibi(op, alibi_slopes, batch, heads, query)
    out, lse = _library.ops.flash_attention(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        sinks,
        alibi_slopes,
        index,
        bits,
        blocks,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=left,
        window_right=right,
        sink_tokens=sink_tokens,
        global_tokens=first,
        softcap=softcap,
    )
    return (out, lse) if return_lse else out


def merge_attention(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to all keys from attentions to parts of them::

        lse = ln Σ_p exp(lses[p]),   out = Σ_p exp(lses[p] - lse) · outs[p]

    Where every part saw nothing, out = 0 and lse = -inf. Sums are fp32. Of parts made with
    ``sinks`` at most one may have had them. Differentiable in both.

    Args:
        outs: fp32, fp16 or bf16 [P, B, S, H, D], P ≥ 1; any strides.
        lses: fp32 [P, B, H, S].

    Returns:
        out [B, S, H, D] in the dtype of outs and lse fp32 [B, H, S], contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: no kernels for the device of outs.

    Source: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference", 2023; Juravsky,
    Brown, Ehrlich, Fu, Ré, Mirhoseini, "Hydragen", 2024 (parts shared by sequences).
    """
    check_parts("merge_attention", outs, lses)
    out, lse = _library.ops.merge_attention(outs, lses)
    return out, lse
