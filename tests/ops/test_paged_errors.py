"""What the paged cache's operators refuse, and how they say it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import pumice
from pumice.ops import _library

Q = torch.ones(2, 3, 4, 8)
K = torch.ones(6, 4, 2, 8)
V = torch.ones(6, 4, 2, 6)
TABLE = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)
LENS = torch.tensor([9, 12], dtype=torch.int32)
CU = torch.tensor([0, 2, 3], dtype=torch.int32)
FP8 = torch.float8_e4m3fn
ONE = torch.ones(1)

ATTENTION: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "query must be a torch.Tensor, not list", {"query": [1.0]}),
    (TypeError, "query must be float32 or float16 or bfloat16, not float64",
     {"query": Q.double()}),
    (ValueError, r"query must have shape \[B, S_q, H, D\], not \[3, 4, 8\]", {"query": Q[0]}),
    (ValueError, r"query must have shape \[total, H, D\] with cu_seqlens_q, not \[2, 3, 4, 8\]",
     {"cu_seqlens_q": CU, "max_seqlen_q": 3}),
    (ValueError, "head dim of query must be that of key_cache, 8", {"query": Q[..., :7]}),
    (ValueError, "heads of query must be a multiple .* query has 3 and the cache 2",
     {"query": Q[:, :, :3]}),
    (ValueError, "query and seq_lens must have one batch size", {"query": Q[:1]}),
    (TypeError, "key_cache must be float32 .* or float8_e4m3fn or int8, not float64",
     {"key_cache": K.double()}),
    (TypeError, "must be of the dtype of query, float32, or float8_e4m3fn or int8, not float16",
     {"key_cache": K.half(), "value_cache": V.half()}),
    (TypeError, "value_cache must be of the dtype of key_cache, float32, not float16",
     {"value_cache": V.half()}),
    (ValueError, r"key_cache must have shape \[num_blocks, .*, not \[4, 2, 8\]",
     {"key_cache": K[0]}),
    (ValueError, "value_cache must have shape .* none of the last three 0",
     {"value_cache": V[..., :0]}),
    (ValueError, "value_cache must have the shape of key_cache .* but for the last",
     {"value_cache": V[:, :3]}),
    (ValueError, "last dimension of key_cache must be contiguous",
     {"key_cache": K.transpose(2, 3).contiguous().transpose(2, 3)}),
    (ValueError, "query is on cpu, but key_cache is on meta",
     {"key_cache": K.to("meta"), "value_cache": V.to("meta")}),
    (TypeError, "block_table must be int32, not int64", {"block_table": TABLE.long()}),
    (ValueError, r"block_table must have shape \[B, max_blocks\], not \[3\]",
     {"block_table": TABLE[0]}),
    (ValueError, "must be of one number of sequences", {"block_table": TABLE[:1]}),
    (ValueError, "block_table is on meta", {"block_table": TABLE.to("meta")}),
    (TypeError, "seq_lens must be int32, not int64", {"seq_lens": LENS.long()}),
    (TypeError, "seq_lens must be a torch.Tensor, not list", {"seq_lens": [9, 12]}),
    (ValueError, "cu_seqlens_q needs max_seqlen_q", {"query": Q[0], "cu_seqlens_q": CU}),
    (ValueError, r"cu_seqlens_q must have shape \[3\], not \[2\]",
     {"query": Q[0], "cu_seqlens_q": CU[:2], "max_seqlen_q": 3}),
    (ValueError, "max_seqlen_q is 4, but each sequence of query has 3", {"max_seqlen_q": 4}),
    (ValueError, "k_scale is for a cache of float8_e4m3fn or int8, but this one is float32",
     {"k_scale": ONE}),
    (ValueError, r"a cache of int8 needs v_scale, float32 \[1\] or \[2\]",
     {"key_cache": K.char(), "value_cache": V.char(), "k_scale": ONE}),
    (ValueError, r"k_scale must have shape \[1\] or \[2\], not \[4\]",
     {"key_cache": K.to(FP8), "value_cache": V.to(FP8), "k_scale": torch.ones(4),
      "v_scale": ONE}),
    (TypeError, "v_scale must be float32, not float16",
     {"key_cache": K.to(FP8), "value_cache": V.to(FP8), "k_scale": ONE, "v_scale": ONE.half()}),
    (TypeError, "tree_mask must be int32 or bool, not float32", {"tree_mask": torch.ones(6, 3)}),
    (ValueError, r"tree_mask must have shape \[6, 3\] \(a bool .* at most 3 queries .* \[5, 3\]",
     {"tree_mask": torch.ones(5, 3, dtype=torch.bool)}),
    (ValueError, r"tree_mask must have shape \[6, 1\] \(a bit",
     {"tree_mask": torch.ones(6, 2, dtype=torch.int32)}),
    (TypeError, "softmax_scale must be a float", {"softmax_scale": "1"}),
    (TypeError, "causal must be a bool", {"causal": 1}),
    (ValueError, "a side of window must be at least -1", {"window": (-2, 0)}),
    (ValueError, "sink_tokens must be in", {"sink_tokens": -1}),
    (ValueError, "softcap must be finite", {"softcap": math.inf}),
    (ValueError, r"sinks must have shape \[4\]", {"sinks": torch.ones(3)}),
    (ValueError, r"alibi_slopes must have shape \[4\] or \[2, 4\]",
     {"alibi_slopes": torch.ones(3)}),
    (RuntimeError, r"seq_lens\[1\] must be from 0 to 12, what a row of block_table holds, not 13",
     {"seq_lens": torch.tensor([9, 13], dtype=torch.int32)}),
    (RuntimeError, r"seq_lens\[0\] must be from 0 to 12, .* not -1",
     {"seq_lens": torch.tensor([-1, 3], dtype=torch.int32)}),
    (RuntimeError, r"block_table\[1, 1\] must be a block from 0 to 5, not -1",
     {"block_table": torch.tensor([[0, 1, 2], [3, -1, 5]], dtype=torch.int32)}),
    (RuntimeError, r"block_table\[0, 2\] must be a block from 0 to 5, not 6",
     {"block_table": torch.tensor([[0, 1, 6], [3, 4, 5]], dtype=torch.int32)}),
    (RuntimeError, "cu_seqlens_q must not descend",
     {"query": Q[0], "cu_seqlens_q": torch.tensor([0, 3, 1], dtype=torch.int32),
      "max_seqlen_q": 3}),
    (RuntimeError, "cu_seqlens_q hold a sequence of 2 tokens, more than its max_seqlen, 1",
     {"query": Q[0], "cu_seqlens_q": CU, "max_seqlen_q": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), ATTENTION)
def test_attention_refuses(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    given = {"query": Q, "key_cache": K, "value_cache": V, "block_table": TABLE, "seq_lens": LENS}
    with pytest.raises(error, match=f"paged_attention: .*{message}|^.*paged_attention.*{message}"):
        pumice.ops.paged_attention(**(given | changed))


KEY, VALUE = torch.ones(5, 2, 8), torch.ones(5, 2, 6)
SLOTS = torch.arange(5)
COS = torch.ones(10, 4)

APPEND: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "key must be a torch.Tensor", {"key": None}),
    (TypeError, "key must be float32 .*, not int8", {"key": KEY.char()}),
    (TypeError, "value must be float32, not float16", {"value": VALUE.half()}),
    (ValueError, r"key must have shape \[T, 2, 8\], .*, not \[5, 2, 7\]", {"key": KEY[..., :7]}),
    (ValueError, r"value must have shape \[T, 2, 6\]", {"value": VALUE[0]}),
    (ValueError, "one number of tokens, not 5 and 4", {"value": VALUE[:4]}),
    (TypeError, "must be of the dtype of key, float16", {"key": KEY.half(),
                                                         "value": VALUE.half()}),
    (TypeError, "slot_mapping must be int64, not int32", {"slot_mapping": SLOTS.int()}),
    (ValueError, r"slot_mapping must have shape \[5\], not \[4\]", {"slot_mapping": SLOTS[:4]}),
    (ValueError, "slot_mapping is on meta", {"slot_mapping": SLOTS.to("meta")}),
    (RuntimeError, r"slot_mapping\[2\] must be below the cache's 24 slots, not 24",
     {"slot_mapping": torch.tensor([0, 1, 24, 3, -1])}),
    (ValueError, "a cache of float8_e4m3fn needs k_scale",
     {"key_cache": K.to(FP8), "value_cache": V.to(FP8)}),
    (TypeError, r"rotary must be a tuple \(cos, sin, positions\)", {"rotary": (COS, COS)}),
    (ValueError, r"cos must have shape \[max_position, D_rot / 2\] with D_rot .*, 8, .* \[10, 5\]",
     {"rotary": (torch.ones(10, 5), torch.ones(10, 5), SLOTS)}),
    (ValueError, "cos and sin must have one shape", {"rotary": (COS, COS[:9], SLOTS)}),
    (TypeError, "positions must be int32 or int64", {"rotary": (COS, COS, SLOTS.float())}),
    (RuntimeError, r"positions\[4\] must be from 0 to 9, the rows of cos, not 10",
     {"rotary": (COS, COS, torch.tensor([0, 1, 2, 3, 10]))}),
    (TypeError, "interleaved must be a bool", {"interleaved": 1}),
    (RuntimeError, "key requires a gradient, but none passes through a cache",
     {"key": KEY.clone().requires_grad_()}),
    (RuntimeError, "value_cache requires a gradient", {"value_cache": V.clone().requires_grad_()}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), APPEND)
def test_append_refuses(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    given = {"key": KEY, "value": VALUE, "key_cache": K.clone(), "value_cache": V.clone(),
             "slot_mapping": SLOTS}  # fmt: skip
    given |= changed
    with pytest.raises(error, match=f"cache_append: .*{message}"):
        pumice.ops.cache_append(**given)
    if given["key_cache"].dtype == torch.float32:
        assert (given["key_cache"] == 1).all()


COPY: list[tuple[type[Exception], str, Any]] = [
    (TypeError, "pairs must be a torch.Tensor, not list", [[0, 1]]),
    (TypeError, "pairs must be int64, not int32", torch.zeros(1, 2, dtype=torch.int32)),
    (ValueError, r"pairs must have shape \[n, 2\], not \[2\]", torch.tensor([0, 1])),
    (RuntimeError, r"pairs\[1\] must be blocks from 0 to 5, not \(0, 6\)", [[1, 2], [0, 6]]),
    (RuntimeError, r"pairs\[0\] must be blocks from 0 to 5, not \(0, -1\)", [[0, -1]]),
    (RuntimeError, "block 2 is the destination of two pairs", [[0, 2], [1, 2]]),
    (RuntimeError, "block 2 is the source of one pair and the destination of another",
     [[0, 2], [2, 3]]),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "pairs"), COPY)
def test_copy_refuses(error: type[Exception], message: str, pairs: Any) -> None:
    cache = torch.arange(6.0).view(6, 1, 1, 1).clone()
    if error is RuntimeError:
        pairs = torch.tensor(pairs)
    with pytest.raises(error, match=f"cache_copy_blocks: .*{message}"):
        pumice.ops.cache_copy_blocks(cache, cache, pairs)
    assert cache.flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_gradient_is_refused() -> None:
    query = Q.clone().requires_grad_()
    out = pumice.ops.paged_attention(query, K, V, TABLE, LENS)
    with pytest.raises(RuntimeError, match=r"paged_attention is not differentiable\. A cache is"):
        out.sum().backward()
    with torch.no_grad():
        pumice.ops.cache_append(KEY.clone().requires_grad_(), VALUE, K.clone(), V.clone(), SLOTS)


def test_the_operators_check_too() -> None:
    """Callers of torch.ops, who pass the Python by."""
    ops = torch.ops.pumice
    rest = [None] * 6
    with pytest.raises(RuntimeError, match="paged_attention: block_table must be int32"):
        ops.paged_attention(Q, K, V, TABLE.long(), LENS, *rest, softmax_scale=1.0)
    with pytest.raises(RuntimeError, match="paged_attention: k_scale is needed by"):
        ops.paged_attention(Q, K.char(), V.char(), TABLE, LENS, *rest, softmax_scale=1.0)
    with pytest.raises(RuntimeError, match="cache_append: slot_mapping must be int64 of shape"):
        ops.cache_append(KEY, VALUE, K.clone(), V.clone(), SLOTS[:2], *[None] * 5)
    with pytest.raises(RuntimeError, match="cache_append: cos, sin and positions belong together"):
        ops.cache_append(KEY, VALUE, K.clone(), V.clone(), SLOTS, None, None, COS, COS, None)
    with pytest.raises(RuntimeError, match="cache_copy_blocks: pairs must be int64 of shape"):
        ops.cache_copy_blocks(K.clone(), V.clone(), SLOTS)


def test_no_kernels_on_a_strange_device() -> None:
    assert "mps" not in _library.devices
    with pytest.raises(RuntimeError, match="paged_attention: no CUDA kernels, because"):
        raise _library.no_kernel("paged_attention", torch.device("cuda"))
