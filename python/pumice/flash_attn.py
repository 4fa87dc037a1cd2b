"""Drop-in names: FlashAttention's functions, and torch's ``scaled_dot_product_attention``.

``from pumice.flash_attn import flash_attn_func`` takes the place of ``from flash_attn import
flash_attn_func``: the same arguments, layout [B, S, H, D], bottom-right causal mask, inclusive
window, and head count of key and value dividing that of query (GQA). It also runs on a CPU, in
float32, with any head dim, and with head dims of query and value that differ.

Not taken over are dropout and the matrix of probabilities, which no kernel of pumice makes: asking
for them is an error. ``deterministic`` may be set: every kernel is deterministic either way.
Everything else that :func:`pumice.ops.flash_attention` can (sinks, global tokens, boolean masks)
is asked for there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.ops import flash_attention, flash_attention_varlen, paged_attention
from pumice.ops._checks import check_tensor, check_vector, shape_of

Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """FlashAttention's ``flash_attn_func``: softmax(softmax_scale · q k^T) v under a mask.

    Args:
        q: [B, S_q, H, D], fp32, fp16 or bf16.
        k, v: [B, S_k, H_kv, D] and [B, S_k, H_kv, D_v], H a multiple of H_kv.
        dropout_p: must be 0.
        softmax_scale: 1 / √D by default.
        causal: bottom-right: query i sees key j ≤ i + S_k - S_q.
        window_size: (left, right), inclusive around i + S_k - S_q; -1 is open.
        softcap: scores become softcap · tanh(score / softcap); 0 for none.
        alibi_slopes: fp32 [H] or [B, H]: scores are lowered by slope · |i + S_k - S_q - j|.
        deterministic: the result is deterministic whatever is passed.
        return_attn_probs: must be False.

    Returns:
        [B, S_q, H, D_v] in the dtype of q; 0 where a query sees no key.

    Raises:
        NotImplementedError: dropout, or ``return_attn_probs``.
        TypeError, ValueError, RuntimeError: as :func:`pumice.ops.flash_attention`.
    """
    _refuse("flash_attn_func", dropout_p, return_attn_probs)
    return flash_attention(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """:func:`flash_attn_func` with key and value in one tensor, kv [B, S_k, 2, H_kv, D]."""
    k, v = _unpack("flash_attn_kvpacked_func", "kv", kv, 2, 5)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """:func:`flash_attn_func` with all three in one tensor, qkv [B, S, 3, H, D]."""
    q, k, v = _unpack("flash_attn_qkvpacked_func", "qkv", qkv, 3, 5)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """FlashAttention's ``flash_attn_varlen_func``: sequences of different lengths, end to end.

    Args:
        q: [total_q, H, D]; sequence b is q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]].
        k, v: [total_k, H_kv, D] and [total_k, H_kv, D_v], likewise by cu_seqlens_k.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], ascending from 0.
        max_seqlen_q, max_seqlen_k: the longest sequence.
        block_table: int32 [B, max_blocks]: k and v are a paged cache, [num_blocks, block_size,
            H_kv, D] and [.., D_v], of any block size; sequence b has cu_seqlens_k[b + 1] -
            cu_seqlens_k[b] keys there (:func:`pumice.ops.paged_attention`, whose errors these are
            then). max_seqlen_k has no influence: the table says how many there can be.

    The other arguments, the errors and the meaning of the result [total_q, H, D_v] are those of
    :func:`flash_attn_func`.
    """
    op = "flash_attn_varlen_func"
    _refuse(op, dropout_p, return_attn_probs)
    if block_table is not None:
        check_tensor(op, "q", q)
        check_tensor(op, "cu_seqlens_q", cu_seqlens_q)
        cu_seqlens_k = check_vector(
            op, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), (torch.int32,), "q", q
        )
        return paged_attention(
            q,
            k,
            v,
            block_table,
            cu_seqlens_k.diff(),
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            softmax_scale=softmax_scale,
            causal=causal,
            window=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
        )
    return flash_attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """:func:`flash_attn_varlen_func` with key and value in one tensor, kv [total_k, 2, H_kv, D]."""
    k, v = _unpack("flash_attn_varlen_kvpacked_func", "kv", kv, 2, 4)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """:func:`flash_attn_varlen_func` with all three in one tensor, qkv [total, 3, H, D]."""
    q, k, v = _unpack("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 3, 4)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``: softmax(scale · query key^T) value.

    The causal mask is torch's, **top-left**: query i sees key j ≤ i, whatever the lengths; that of
    :func:`pumice.ops.flash_attention` is bottom-right. They differ where S_q ≠ S_k. A query that
    sees no key gives 0, as in torch since 2.5.

    Args:
        query: [B, H, S_q, D] or [H, S_q, D]; fp32, fp16 or bf16; any strides.
        key, value: [B, H, S_k, D] and [B, H, S_k, D_v]; with ``enable_gqa`` H_kv heads, H a
            multiple of H_kv.
        attn_mask: bool, broadcastable to [B, H, S_q, S_k], True where a query sees a key. A float
            mask is refused: one of 0 and -inf is the same as ``attn_mask == 0``, and any other is
            a bias, which no kernel of pumice adds (ALiBi is an argument of
            :func:`pumice.ops.flash_attention`).
        dropout_p: must be 0.
        is_causal: the top-left causal mask; excludes ``attn_mask``.
        scale: 1 / √D by default.
        enable_gqa: allow fewer heads of key and value than of query.

    Returns:
        [B, H, S_q, D_v] or [H, S_q, D_v] in the dtype of query, with the strides of a transposed
        [B, S_q, H, D_v].

    Raises:
        NotImplementedError: dropout.
        TypeError: a float mask.
        TypeError, ValueError, RuntimeError: as :func:`pumice.ops.flash_attention`.
    """
    op = "scaled_dot_product_attention"
    _refuse(op, dropout_p, False)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, tensor)
        if tensor.dim() != query.dim() or tensor.dim() not in (3, 4):
            raise ValueError(
                f"{op}: query, key and value must have shape [B, H, S, D] or all [H, S, D], but "
                f"{name} has shape {shape_of(tensor)}"
            )
    if attn_mask is not None:
        check_tensor(op, "attn_mask", attn_mask)
        if is_causal:
            raise ValueError(f"{op}: attn_mask and is_causal exclude each other")
        if attn_mask.dtype != torch.bool:
            raise TypeError(
                f"{op}: attn_mask must be bool (True where a query sees a key), not "
                f"{str(attn_mask.dtype)[6:]}; one of 0 and -inf is `attn_mask == 0`, and other "
                "biases are not supported"
            )
    if query.dim() == 3:
        mask = attn_mask[None] if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
        return scaled_dot_product_attention(
            query[None], key[None], value[None], mask, 0.0, is_causal, scale, enable_gqa
        )[0]
    if not enable_gqa and key.shape[1] != query.shape[1]:
        raise ValueError(
            f"{op}: query has {query.shape[1]} heads and key {key.shape[1]}; pass enable_gqa=True "
            "to share each head of key and value among several of query"
        )
    window = (-1, -1)
    if is_causal:
        key, value, window = _top_left(query, key, value)
    out = flash_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        softmax_scale=scale,
        window=window,
        mask=attn_mask,
    )
    return out.transpose(1, 2)


def _top_left(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Window]:
    """Keys, values and the window for j ≤ i, of tensors [B, H, S, D].

    Keys from S_q on are seen by nobody and are left out. Then query i stands at i + S_k - S_q ≤ i,
    and the keys up to i reach S_q - S_k to its right.
    """
    queries = query.shape[2]
    key, value = key[:, :, :queries], value[:, :, :queries]
    return key, value, (-1, queries - key.shape[2])


def _unpack(op: str, name: str, packed: Tensor, count: int, dims: int) -> tuple[Tensor, ...]:
    """The tensors that are stacked along the third dimension from the right."""
    check_tensor(op, name, packed)
    if packed.dim() != dims or packed.shape[-3] != count:
        lengths = "B, S" if dims == 5 else "total"
        raise ValueError(
            f"{op}: {name} must have shape [{lengths}, {count}, H, D], not {shape_of(packed)}"
        )
    return packed.unbind(-3)


def _refuse(op: str, dropout_p: float, return_attn_probs: bool) -> None:
    if dropout_p:
        raise NotImplementedError(
            f"{op}: dropout_p = {dropout_p}, but attention dropout is not supported; pass 0.0 "
            "(in a model: its attention_dropout, or model.eval())"
        )
    if return_attn_probs:
        raise NotImplementedError(
            f"{op}: the probabilities are never made; for the log-sum-exp of the scores call "
            "pumice.ops.flash_attention(..., return_lse=True)"
        )
