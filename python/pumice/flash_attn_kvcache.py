"""Drop-in names over a cache: FlashAttention's ``flash_attn_with_kvcache``, vLLM's
``reshape_and_cache_flash``.

The cache is one tensor of whole sequences [B, S, H_kv, D], or blocks of a pool [num_blocks,
block_size, H_kv, D] with a block table, of any block size. Both are
:func:`pumice.ops.paged_attention` and :func:`pumice.ops.cache_append`: a cache of whole sequences
is one of a block each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.ops import cache_append, paged_attention
from pumice.ops._checks import check_dtype, check_same_device, check_tensor, shape_of

Window = tuple[int, int]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """FlashAttention's ``flash_attn_with_kvcache``: append to a cache, then attend to it.

    k and v, if given, are written behind the cache_seqlens[b] tokens of each sequence, in place.
    Then the queries attend to the tokens of the cache and the new ones, the last query at the last
    of them. With rotary_cos and rotary_sin new keys are rotated by their place in the cache before
    they are written, and so are the queries if they are causal or have a window; else all queries
    by cache_seqlens[b] (as FlashAttention has it).

    Args:
        q: fp32, fp16 or bf16 [B, S_q, H, D].
        k_cache, v_cache: [B_cache, S_cache, H_kv, D] and [.., D_v], or with block_table
            [num_blocks, block_size, H_kv, D]; the dtype of q, or float8_e4m3fn or int8 with scales.
        k, v: [B, S_new, H_kv, D] and [.., D_v], both or none.
        rotary_cos, rotary_sin: [max_position, D_rot / 2]; they need k.
        cache_seqlens: tokens of each sequence, int32 [B] or an int for all; None: S_cache.
        cache_batch_idx: int32 [B], the row of the cache of each sequence; not with block_table.
        cache_leftpad: must be None.
        block_table: int32 [B, max_blocks].
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in
            :func:`pumice.flash_attn.flash_attn_func`.
        rotary_interleaved: pairs of neighbours (GPT-J) rather than of halves (GPT-NeoX, Llama).
        num_splits: has no influence: how keys are split depends on a sequence alone.
        return_softmax_lse: return lse too.
        k_scale, v_scale: as in :func:`pumice.ops.paged_attention`.

    Returns:
        out [B, S_q, H, D_v]; with return_softmax_lse (out, lse), lse fp32 [B, H, S_q].

    Raises:
        NotImplementedError: cache_leftpad.
        TypeError, ValueError, RuntimeError: as :func:`pumice.ops.paged_attention` and
            :func:`pumice.ops.cache_append`; new tokens that do not fit the cache are a
            RuntimeError on the CPU, while CUDA skips them.
    """
    op = "flash_attn_with_kvcache"
    if cache_leftpad is not None:
        raise NotImplementedError(f"{op}: cache_leftpad is given, but is not supported; pass None")
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(op, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must have 4 dimensions, not shape {shape_of(tensor)}")
    if (k is None) != (v is None):
        raise ValueError(f"{op}: k and v belong together, but only one of them is given")
    if (rotary_cos is None) != (rotary_sin is None) or (rotary_cos is not None and k is None):
        raise ValueError(f"{op}: rotary_cos and rotary_sin belong together, and need k and v")
    batch, block_size = q.shape[0], k_cache.shape[1]
    table = _table(op, q, k_cache, cache_batch_idx, block_table)
    lengths = _lengths(op, q, cache_seqlens, block_size * table.shape[1])
    if k is not None and v is not None:
        for name, tensor in (("k", k), ("v", v)):
            check_tensor(op, name, tensor)
            if tensor.dim() != 4 or tensor.shape[:2] != (batch, k.shape[1]):
                raise ValueError(
                    f"{op}: k and v must have shape [{batch}, S_new, H_kv, D], but {name} has "
                    f"shape {shape_of(tensor)}"
                )
        places = lengths[:, None].long() + torch.arange(k.shape[1], device=q.device)
        rotary = None
        if rotary_cos is not None and rotary_sin is not None:
            rotary = (rotary_cos, rotary_sin, places.flatten())
            step = int(causal or tuple(window_size) != (-1, -1))
            positions = lengths[:, None].long() + step * torch.arange(q.shape[1], device=q.device)
            q = _rotate(q, rotary_cos, rotary_sin, positions, rotary_interleaved)
        cache_append(
            k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache,
            _slots(table, places, block_size).flatten(), k_scale=k_scale, v_scale=v_scale,
            rotary=rotary, interleaved=rotary_interleaved,
        )  # fmt: skip
        lengths = lengths + k.shape[1]
    return paged_attention(
        q, k_cache, v_cache, table, lengths, softmax_scale=softmax_scale, causal=causal,
        window=window_size, softcap=softcap, alibi_slopes=alibi_slopes, k_scale=k_scale,
        v_scale=v_scale, return_lse=return_softmax_lse,
    )  # fmt: skip


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """vLLM's ``reshape_and_cache_flash``: write tokens into the slots of a paged cache, in place.

    Args:
        key, value: [T, H_kv, D] and [T, H_kv, D_v]; those past slot_mapping are padding.
        key_cache, value_cache: [num_blocks, block_size, H_kv, D] and [.., D_v]; for fp8 also uint8.
        slot_mapping: int64 [≤ T]; -1 skips.
        kv_cache_dtype: "auto" (the dtype of the cache decides), or "fp8" or "fp8_e4m3".
        k_scale, v_scale: fp32 of one element or [H_kv]; not looked at by a cache of floats, as in
            vLLM, which passes them always.

    Raises:
        ValueError: another kv_cache_dtype, or one that is not that of the cache.
        TypeError, ValueError, RuntimeError: as :func:`pumice.ops.cache_append`.
    """
    op = "reshape_and_cache_flash"
    if kv_cache_dtype not in ("auto", "fp8", "fp8_e4m3"):
        raise ValueError(
            f'{op}: kv_cache_dtype must be "auto", "fp8" or "fp8_e4m3", not {kv_cache_dtype!r}'
        )
    check_tensor(op, "slot_mapping", slot_mapping)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_tensor(op, name, cache)
        if kv_cache_dtype != "auto":
            check_dtype(op, name, cache, (torch.uint8, torch.float8_e4m3fn))
    if kv_cache_dtype != "auto":
        key_cache = key_cache.view(torch.float8_e4m3fn)
        value_cache = value_cache.view(torch.float8_e4m3fn)
    scales: dict[str, Any] = {}
    if key_cache.element_size() == 1:
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            scales[name] = scale.reshape(-1) if isinstance(scale, Tensor) else scale
    tokens = slot_mapping.shape[0] if slot_mapping.dim() == 1 else None
    cache_append(key[:tokens], value[:tokens], key_cache, value_cache, slot_mapping, **scales)


def _table(
    op: str, q: Tensor, k_cache: Tensor, rows: Tensor | None, block_table: Tensor | None
) -> Tensor:
    """The block table, or one of a cache of whole sequences, a block each."""
    if block_table is not None:
        if rows is not None:
            raise ValueError(f"{op}: block_table and cache_batch_idx exclude each other")
        check_tensor(op, "block_table", block_table)
        if block_table.dim() != 2:
            raise ValueError(
                f"{op}: block_table must have shape [B, max_blocks], not {shape_of(block_table)}"
            )
        return block_table
    batch = q.shape[0]
    if rows is None:
        if k_cache.shape[0] != batch:
            raise ValueError(
                f"{op}: k_cache must have the batch of q, {batch}, not shape {shape_of(k_cache)}; "
                "pass cache_batch_idx or block_table otherwise"
            )
        return torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
    check_tensor(op, "cache_batch_idx", rows)
    check_dtype(op, "cache_batch_idx", rows, (torch.int32, torch.int64))
    if rows.shape != (batch,):
        raise ValueError(f"{op}: cache_batch_idx must have shape [{batch}], not {shape_of(rows)}")
    return rows.int()[:, None]


def _lengths(op: str, q: Tensor, lengths: int | Tensor | None, capacity: int) -> Tensor:
    """int32 [B]."""
    batch = q.shape[0]
    if lengths is None:
        lengths = capacity
    if isinstance(lengths, int):
        return torch.full((batch,), lengths, dtype=torch.int32, device=q.device)
    check_tensor(op, "cache_seqlens", lengths)
    check_dtype(op, "cache_seqlens", lengths, (torch.int32,))
    check_same_device(op, "cache_seqlens", lengths, "q", q)
    if lengths.shape != (batch,):
        raise ValueError(f"{op}: cache_seqlens must have shape [{batch}], not {shape_of(lengths)}")
    return lengths


def _slots(table: Tensor, places: Tensor, block_size: int) -> Tensor:
    """Where tokens [B, S] go. Beyond the table: a slot that no cache has."""
    column = places // block_size
    block = table.long().gather(1, column.clamp(max=table.shape[1] - 1))
    slot = block * block_size + places % block_size
    inside = (column < table.shape[1]) & (block >= 0)
    return torch.where(inside, slot, torch.iinfo(torch.int64).max)


def _rotate(q: Tensor, cos: Tensor, sin: Tensor, places: Tensor, interleaved: bool) -> Tensor:
    """Pairs of q [B, S, H, D] turned by the angles of places [B, S], in fp32, as cache_append."""
    c, s = cos.float()[places][:, :, None], sin.float()[places][:, :, None]
    turned, rest = q[..., : 2 * c.shape[-1]].float(), q[..., 2 * c.shape[-1] :]
    pairs = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
    a, b = pairs
    both = (a * c - b * s, b * c + a * s)
    turned = torch.stack(both, dim=-1).flatten(-2) if interleaved else torch.cat(both, dim=-1)
    return torch.cat([turned.to(q.dtype), rest], dim=-1)
