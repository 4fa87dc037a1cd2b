"""Checks of the arguments of the paged cache's operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pumice.ops import _library
from pumice.ops._attention_checks import CUDA_HEAD_DIM, SEQUENCE_LIMIT, written
from pumice.ops._checks import (
    FLOATING,
    check_dtype,
    check_kernels,
    check_same_device,
    check_tensor,
    check_vector,
    shape_of,
)

# What a cache can hold instead of its operands' dtype, one byte an element, with a scale.
QUANTIZED = (torch.float8_e4m3fn, torch.int8)


class CacheSizes(NamedTuple):
    blocks: int
    block_size: int
    kv_heads: int
    dim: int
    value_dim: int


def check_caches(op: str, key_cache: Any, value_cache: Any) -> CacheSizes:
    """key_cache [num_blocks, block_size, H_kv, D], value_cache [..., D_v], of one dtype."""
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        check_tensor(op, name, cache)
        check_dtype(op, name, cache, (*FLOATING, *QUANTIZED))
        if cache.dim() != 4 or 0 in cache.shape[1:]:
            raise ValueError(
                f"{op}: {name} must have shape [num_blocks, block_size, H_kv, D], none of the last "
                f"three 0, not {shape_of(cache)}"
            )
        if cache.shape[3] > 1 and cache.stride(3) != 1:
            raise ValueError(
                f"{op}: the last dimension of {name} must be contiguous, for a cache is used where "
                f"it lies; its strides are {written(cache.stride())}"
            )
    check_same_device(op, "value_cache", value_cache, "key_cache", key_cache)
    check_kernels(op, key_cache)
    if value_cache.dtype != key_cache.dtype:
        raise TypeError(
            f"{op}: value_cache must be of the dtype of key_cache, {str(key_cache.dtype)[6:]}, not "
            f"{str(value_cache.dtype)[6:]}"
        )
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise ValueError(
            f"{op}: value_cache must have the shape of key_cache {shape_of(key_cache)} but for the "
            f"last dimension, not {shape_of(value_cache)}"
        )
    blocks, block_size, kv_heads, dim = key_cache.shape
    if block_size >= SEQUENCE_LIMIT:
        raise ValueError(f"{op}: block_size must be below 2^29, not {block_size}")
    return CacheSizes(blocks, block_size, kv_heads, dim, value_cache.shape[3])


def check_stored_dtype(op: str, first: str, operand: Tensor, key_cache: Tensor) -> None:
    """Operands of a floating dtype, and a cache of that dtype or of bytes."""
    check_same_device(op, first, operand, "key_cache", key_cache)
    if key_cache.dtype not in (operand.dtype, *QUANTIZED):
        raise TypeError(
            f"{op}: key_cache and value_cache must be of the dtype of {first}, "
            f"{str(operand.dtype)[6:]}, or float8_e4m3fn or int8, not {str(key_cache.dtype)[6:]}"
        )


def check_scales(
    op: str, k_scale: Any, v_scale: Any, key_cache: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """fp32 [1] or [H_kv] each for a cache of bytes, None for one of floats; contiguous."""
    scales: list[Tensor | None] = []
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if key_cache.dtype not in QUANTIZED:
            if scale is not None:
                raise ValueError(
                    f"{op}: {name} is for a cache of float8_e4m3fn or int8, but this one is "
                    f"{str(key_cache.dtype)[6:]}"
                )
            scales.append(None)
            continue
        if scale is None:
            raise ValueError(
                f"{op}: a cache of {str(key_cache.dtype)[6:]} needs {name}, float32 [1] or "
                f"[{key_cache.shape[2]}]"
            )
        sizes = (1, key_cache.shape[2])
        scales.append(
            check_vector(op, name, scale, sizes, (torch.float32,), "key_cache", key_cache)
        )
    return scales[0], scales[1]


def check_paged_query(op: str, query: Any, sizes: CacheSizes, packed: bool) -> None:
    """query [B, S_q, H, D], or [total, H, D] where packed; any strides."""
    check_tensor(op, "query", query)
    check_dtype(op, "query", query, FLOATING)
    if query.dim() != (3 if packed else 4):
        form = "[total, H, D] with cu_seqlens_q" if packed else "[B, S_q, H, D]"
        raise ValueError(f"{op}: query must have shape {form}, not {shape_of(query)}")
    heads, dim = query.shape[-2:]
    if dim != sizes.dim:
        raise ValueError(
            f"{op}: the head dim of query must be that of key_cache, {sizes.dim}, but query has "
            f"shape {shape_of(query)}"
        )
    if heads < 1 or heads % sizes.kv_heads != 0:
        raise ValueError(
            f"{op}: the heads of query must be a multiple of those of the cache (one or more query "
            f"heads for each KV head), but query has {heads} and the cache {sizes.kv_heads}"
        )
    if query.is_cuda and (dim > CUDA_HEAD_DIM or sizes.value_dim > CUDA_HEAD_DIM):
        raise ValueError(
            f"{op}: on CUDA the head dims of query and value_cache can be at most {CUDA_HEAD_DIM}, "
            f"not {dim} and {sizes.value_dim}; the CPU takes any"
        )


def check_table(op: str, block_table: Any, seq_lens: Any, query: Tensor) -> int:
    """block_table int32 [B, max_blocks] and seq_lens int32 [B]; returns B."""
    for name, tensor, dims in (("block_table", block_table, 2), ("seq_lens", seq_lens, 1)):
        check_tensor(op, name, tensor)
        check_dtype(op, name, tensor, (torch.int32,))
        check_same_device(op, name, tensor, "query", query)
        if tensor.dim() != dims:
            form = "[B, max_blocks]" if dims == 2 else "[B]"
            raise ValueError(f"{op}: {name} must have shape {form}, not {shape_of(tensor)}")
    batch: int = seq_lens.shape[0]
    if block_table.shape[0] != batch:
        raise ValueError(
            f"{op}: block_table and seq_lens must be of one number of sequences, but their shapes "
            f"are {shape_of(block_table)} and {shape_of(seq_lens)}"
        )
    return batch


def check_tree_mask(op: str, tree_mask: Any, rows: int, longest: int, query: Tensor) -> Tensor:
    """Packed, int32 [rows, ceil(longest / 32)] from it or from bool [rows, longest]."""
    check_tensor(op, "tree_mask", tree_mask)
    check_dtype(op, "tree_mask", tree_mask, (torch.int32, torch.bool))
    check_same_device(op, "tree_mask", tree_mask, "query", query)
    packed = tree_mask.dtype == torch.int32
    columns = (longest + 31) // 32 if packed else longest
    if tree_mask.shape != (rows, columns):
        raise ValueError(
            f"{op}: tree_mask must have shape [{rows}, {columns}] ("
            + ("a bit" if packed else "a bool")
            + f" for each of at most {longest} queries of a sequence), not {shape_of(tree_mask)}"
        )
    if packed:
        contiguous: Tensor = tree_mask.contiguous()
        return contiguous
    bits, _ = _library.ops.attention_mask_pack(tree_mask[None, None])
    first: Tensor = bits[0, 0]
    return first


def check_tokens(op: str, key: Any, value: Any, sizes: CacheSizes) -> int:
    """key [T, H_kv, D] and value [T, H_kv, D_v] of one floating dtype; returns T."""
    check_tensor(op, "key", key)
    check_dtype(op, "key", key, FLOATING)
    check_tensor(op, "value", value)
    check_dtype(op, "value", value, (key.dtype,))
    check_same_device(op, "value", value, "key", key)
    tokens = key.shape[0] if key.dim() == 3 else 0
    for name, tensor, dim in (("key", key, sizes.dim), ("value", value, sizes.value_dim)):
        if tensor.dim() != 3 or tensor.shape[1:] != (sizes.kv_heads, dim):
            raise ValueError(
                f"{op}: {name} must have shape [T, {sizes.kv_heads}, {dim}], the heads and head "
                f"dim of its cache, not {shape_of(tensor)}"
            )
    if value.shape[0] != tokens:
        raise ValueError(
            f"{op}: key and value must be of one number of tokens, not {tokens} and "
            f"{value.shape[0]}"
        )
    return tokens


def check_rotary(op: str, rotary: Any, tokens: int, dim: int, key: Tensor) -> tuple[Tensor, ...]:
    """(cos, sin, positions): fp32 [max_position, D_rot / 2] twice, int64 [tokens]; contiguous."""
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 3:
        raise TypeError(f"{op}: rotary must be a tuple (cos, sin, positions) of tensors")
    cos, sin, positions = rotary
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, table)
        check_dtype(op, name, table, FLOATING)
        check_same_device(op, name, table, "key", key)
        if table.dim() != 2 or table.shape[1] < 1 or 2 * table.shape[1] > dim:
            raise ValueError(
                f"{op}: {name} must have shape [max_position, D_rot / 2] with D_rot from 2 to the "
                f"head dim of key, {dim}, not {shape_of(table)}"
            )
    if cos.shape != sin.shape:
        raise ValueError(
            f"{op}: cos and sin must have one shape, not {shape_of(cos)} and {shape_of(sin)}"
        )
    positions = check_vector(
        op, "positions", positions, (tokens,), (torch.int32, torch.int64), "key", key
    )
    return cos.float().contiguous(), sin.float().contiguous(), positions.long()


def check_no_gradient(op: str, **tensors: Tensor | None) -> None:
    """A cache is memory, not a function: what is written there carries no gradient."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} requires a gradient, but none passes through a cache; call it under "
                "torch.no_grad() or torch.inference_mode(), or detach the tensor"
            )
