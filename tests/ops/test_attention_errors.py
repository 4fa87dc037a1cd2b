"""What the attention operators refuse, and how they say it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import pumice
from backends import Backend
from pumice.ops import PackedMask

Q = torch.ones(2, 3, 4, 8)
K = torch.ones(2, 5, 2, 8)
V = torch.ones(2, 5, 2, 6)
CU_Q = torch.tensor([0, 3, 6], dtype=torch.int32)
CU_K = torch.tensor([0, 5, 10], dtype=torch.int32)
MASK = torch.ones(3, 5, dtype=torch.bool)

OPTIONS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "softmax_scale must be a float, not str", {"softmax_scale": "1"}),
    (TypeError, "softmax_scale must be a float, not Tensor", {"softmax_scale": torch.ones(())}),
    (ValueError, "softmax_scale must be finite, not nan", {"softmax_scale": math.nan}),
    (TypeError, "causal must be a bool, not int", {"causal": 1}),
    (TypeError, r"window must be a pair of ints \(left, right\), .* not 5", {"window": 5}),
    (TypeError, "window must be a pair of ints", {"window": (1, 2, 3)}),
    (TypeError, "window must be a pair of ints .*, not of float", {"window": (1.0, 2)}),
    (TypeError, "window must be a pair of ints .*, not of NoneType", {"window": (None, 0)}),
    (ValueError, r"a side of window must be at least -1 \(no bound\), not -2",
     {"window": (3, -2)}),
    (TypeError, "sink_tokens must be an int, not bool", {"sink_tokens": True}),
    (ValueError, r"sink_tokens must be in \[0, 2\^29\), not -1", {"sink_tokens": -1}),
    (TypeError, "global_tokens must be an int .*, or positions: .*, not float",
     {"global_tokens": 1.0}),
    (TypeError, "global_tokens must be an int .* not str", {"global_tokens": "12"}),
    (TypeError, "a position in global_tokens must be an int, not float",
     {"global_tokens": [1, 2.0]}),
    (ValueError, "a position in global_tokens must be in .*, not -1", {"global_tokens": [3, -1]}),
    (ValueError, r"global_tokens must be in \[0, 2\^29\), not -3", {"global_tokens": -3}),
    (TypeError, "global_tokens must be int32 or int64, not float32",
     {"global_tokens": torch.ones(3)}),
    (ValueError, r"global_tokens must have shape \[G\] or \[2, G\], not \[3, 1\]",
     {"global_tokens": torch.ones(3, 1, dtype=torch.int32)}),
    (ValueError, "global_tokens is on meta, but query is on cpu",
     {"global_tokens": torch.ones(3, dtype=torch.int32, device="meta")}),
    (TypeError, "sinks must be a torch.Tensor, not float", {"sinks": 1.0}),
    (TypeError, "sinks must be float32 or float16 or bfloat16, not float64",
     {"sinks": torch.ones(4, dtype=torch.float64)}),
    (ValueError, r"sinks must have shape \[4\], not \[2\]", {"sinks": torch.ones(2)}),
    (ValueError, "sinks is on meta", {"sinks": torch.ones(4, device="meta")}),
    (TypeError, "softcap must be a float, not str", {"softcap": "0"}),
    (ValueError, "softcap must not be below 0, not -1.0", {"softcap": -1.0}),
    (ValueError, "softcap must be finite, not inf", {"softcap": math.inf}),
    (TypeError, "alibi_slopes must be float32 or float16 or bfloat16, not int64",
     {"alibi_slopes": torch.ones(4, dtype=torch.int64)}),
    (ValueError, r"alibi_slopes must have shape \[4\] or \[2, 4\], not \[4, 2\]",
     {"alibi_slopes": torch.ones(4, 2)}),
    (ValueError, "alibi_slopes requires a gradient",
     {"alibi_slopes": torch.ones(4, requires_grad=True)}),
]  # fmt: skip

DENSE: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "query must be a torch.Tensor, not list", {"query": [1.0]}),
    (TypeError, "query must be float32 or float16 or bfloat16, not float64",
     {"query": Q.double()}),
    (TypeError, "key must be float32, not float16", {"key": K.half()}),
    (TypeError, "value must be a torch.Tensor, not NoneType", {"value": None}),
    (ValueError, r"query must have shape \[batch, sequence, heads, dim\], not \[3, 4, 8\]",
     {"query": Q[0]}),
    (ValueError, r"value must have shape \[batch, sequence, heads, dim\], not \[5, 2, 6\]",
     {"value": V[0]}),
    (ValueError, "key is on meta, but query is on cpu", {"key": K.to("meta")}),
    (ValueError, "query must have at least one head", {"query": Q[:, :, :0]}),
    (ValueError, "query must have at least one head, of at least one dim", {"query": Q[..., :0]}),
    (ValueError, r"head dim of key must be that of query, 8, .* \[2, 5, 2, 7\]",
     {"key": K[..., :7]}),
    (ValueError, "heads of query must be a multiple .* query has 3 and key has 2",
     {"query": Q[:, :, :3]}),
    (ValueError, "heads of query must be a multiple", {"key": K[:, :, :0], "value": V[:, :, :0]}),
    (ValueError, r"value must have the shape of key \[2, 5, 2, 8\] .* not \[2, 4, 2, 6\]",
     {"value": V[:, :4]}),
    (ValueError, "value must have the shape of key", {"value": V[:, :, :1]}),
    (ValueError, "value must have the shape of key .* at least 1", {"value": V[..., :0]}),
    (ValueError, r"one batch size, .* \[2, 3, 4, 8\] and \[1, 5, 2, 8\]",
     {"key": K[:1], "value": V[:1]}),
    (TypeError, "mask must be a torch.Tensor or a PackedMask, not list", {"mask": [True]}),
    (TypeError, "mask must be bool .*, not float32; an additive mask", {"mask": MASK.float()}),
    (ValueError, r"mask must be broadcastable to .* = \[2, 4, 3, 5\], not \[5, 3\]",
     {"mask": MASK.T}),
    (ValueError, "mask must be broadcastable", {"mask": MASK[0]}),
    (ValueError, "mask must be broadcastable", {"mask": MASK.expand(1, 2, 4, 3, 5)}),
    (ValueError, r"not \[3, 1, 3, 5\]", {"mask": MASK.expand(3, 1, 3, 5)}),
    (ValueError, r"not \[1, 2, 3, 5\]", {"mask": MASK.expand(1, 2, 3, 5)}),
    (ValueError, "mask is on meta", {"mask": MASK.to("meta")}),
    (ValueError, r"\(a packed one in its first two\), not \[1, 1, 1, 5\]",
     {"mask": PackedMask(torch.zeros(1, 1, 1, 1, dtype=torch.int32),
                         torch.zeros(1, 1, 1, 1, dtype=torch.uint8), (1, 1, 1, 5))}),
]  # fmt: skip

PACKED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, r"query must have shape \[total, heads, dim\], not \[2, 3, 4, 8\]", {"query": Q}),
    (TypeError, "cu_seqlens_q must be a torch.Tensor, not list", {"cu_seqlens_q": [0, 3, 6]}),
    (TypeError, "cu_seqlens_k must be int32, not int64", {"cu_seqlens_k": CU_K.long()}),
    (ValueError, r"cu_seqlens_q must have shape \[B \+ 1\], not \[\]", {"cu_seqlens_q": CU_Q[0]}),
    (ValueError, r"cu_seqlens_k must have shape \[B \+ 1\], not \[0\]",
     {"cu_seqlens_k": CU_K[:0]}),
    (ValueError, r"one shape \[B \+ 1\], not \[3\] and \[2\]", {"cu_seqlens_k": CU_K[:2]}),
    (ValueError, "cu_seqlens_q is on meta", {"cu_seqlens_q": CU_Q.to("meta")}),
    (TypeError, "max_seqlen_q must be an int, not Tensor", {"max_seqlen_q": CU_Q[1]}),
    (TypeError, "max_seqlen_k must be an int, not float", {"max_seqlen_k": 5.0}),
    (ValueError, r"max_seqlen_k must be in \[0, 2\^29\), not -1", {"max_seqlen_k": -1}),
    (ValueError, "value must have the shape of key", {"value": V.flatten(0, 1)[:9]}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), [*DENSE, *OPTIONS])
def test_dense(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^flash_attention: .*{message}"):
        pumice.ops.flash_attention(**{"query": Q, "key": K, "value": V} | changed)


@pytest.mark.parametrize(("error", "message", "changed"), [*PACKED, *OPTIONS])
def test_packed(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    arguments = {
        "query": Q.flatten(0, 1), "key": K.flatten(0, 1), "value": V.flatten(0, 1),
        "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 3, "max_seqlen_k": 5,
    }  # fmt: skip
    with pytest.raises(error, match=f"^flash_attention_varlen: .*{message}"):
        pumice.ops.flash_attention_varlen(**arguments | changed)


def test_sequences_of_2_29_tokens_are_refused() -> None:
    long = torch.ones(1, 1, 1, 1).expand(1, 2**29, 1, 1)
    short = long[:, :1]
    with pytest.raises(ValueError, match=r"shorter than 2\^29, but .* key has 536870912"):
        pumice.ops.flash_attention(short, long, long)
    with pytest.raises(ValueError, match="query has 536870912 tokens"):
        pumice.ops.flash_attention(long, short, short)


@pytest.mark.parametrize(
    ("cu_seqlens_q", "cu_seqlens_k"),
    [
        ([0, 3, 7], [0, 5, 10]),  # past the end of query
        ([0, 3, 6], [0, 5, 11]),
        ([-1, 2, 5], [0, 5, 10]),
        ([0, 4, 3], [0, 5, 10]),  # backwards
        ([0, 3, 6], [0, 5, 2]),
        ([0, 4, 6], [0, 5, 10]),  # more queries than max_seqlen_q
        ([0, 3, 6], [0, 6, 10]),
    ],
)
def test_cu_seqlens_that_do_not_fit(cu_seqlens_q: list[int], cu_seqlens_k: list[int]) -> None:
    """Checked where it costs nothing: on the CPU."""
    with pytest.raises(RuntimeError, match=r"flash_attention: cu_seqlens_[qk]"):
        pumice.ops.flash_attention_varlen(
            Q.flatten(0, 1),
            K.flatten(0, 1),
            V.flatten(0, 1),
            torch.tensor(cu_seqlens_q, dtype=torch.int32),
            torch.tensor(cu_seqlens_k, dtype=torch.int32),
            max_seqlen_q=3,
            max_seqlen_k=5,
        )


@pytest.mark.parametrize(
    ("error", "message", "mask"),
    [
        (TypeError, "mask must be a torch.Tensor, not list", [[True]]),
        (TypeError, "mask must be bool, not uint8", MASK.byte()),
        (ValueError, r"mask must have shape \[S_q, S_k\], .* not \[5\]", MASK[0]),
        (ValueError, r"mask must have shape", MASK.expand(1, 1, 1, 3, 5)),
    ],
)
def test_pack(error: type[Exception], message: str, mask: Any) -> None:
    with pytest.raises(error, match=f"^pack_attention_mask: {message}"):
        pumice.ops.pack_attention_mask(mask)


OUTS = torch.ones(3, 2, 5, 4, 8)
LSES = torch.ones(3, 2, 4, 5)


@pytest.mark.parametrize(
    ("error", "message", "outs", "lses"),
    [
        (TypeError, "outs must be a torch.Tensor, not list", [1], LSES),
        (TypeError, "outs must be float32 or .*, not float64", OUTS.double(), LSES),
        (TypeError, "lses must be float32, not float16", OUTS, LSES.half()),
        (ValueError, r"outs must have shape \[P, B, S, H, D\] .*, not \[2, 5, 4, 8\]",
         OUTS[0], LSES[0]),
        (ValueError, r"P, D >= 1, not \[0, 2, 5, 4, 8\]", OUTS[:0], LSES[:0]),
        (ValueError, r"lses must have shape \[3, 2, 4, 5\], .* not \[3, 2, 5, 4\]",
         OUTS, LSES.mT),
        (ValueError, "lses is on meta", OUTS, LSES.to("meta")),
    ],
)  # fmt: skip
def test_merge(error: type[Exception], message: str, outs: Any, lses: Any) -> None:
    with pytest.raises(error, match=f"^merge_attention: .*{message}"):
        pumice.ops.merge_attention(outs, lses)


def raw(backend: Backend, **changed: Any) -> Any:
    """torch.ops itself, that python/pumice/ops does not stand before."""
    tensors: dict[str, Any] = {"query": Q, "key": K, "value": V}
    names = ("cu_seqlens_q", "cu_seqlens_k", "sinks", "alibi_slopes", "global_index", "mask_bits",
             "mask_blocks")  # fmt: skip
    tensors |= dict.fromkeys(names)
    options = {"softmax_scale": 1.0} | {k: v for k, v in changed.items() if k not in tensors}
    tensors |= {k: v for k, v in changed.items() if k in tensors}
    moved = [t if t is None else t.to(backend.device) for t in tensors.values()]
    return backend.ops.flash_attention(*moved, **options)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("query must be float32, float16 or bfloat16",
         {"query": Q.double(), "key": K.double(), "value": V.double()}),
        ("of one dtype", {"key": K.half()}),
        ("4 dimensions", {"query": Q[0]}),
        ("one head dim", {"query": Q[..., :5]}),
        ("multiple", {"query": Q[:, :, :3]}),
        ("one length", {"value": V[:, :4]}),
        ("one batch size", {"query": Q[:1]}),
        ("belong together", {"cu_seqlens_q": CU_Q}),
        ("belong together", {"mask_bits": torch.zeros(1, 1, 3, 1, dtype=torch.int32)}),
        ("mask_bits must have shape", {"mask_bits": torch.zeros(1, 1, 4, 1, dtype=torch.int32),
                                       "mask_blocks": torch.zeros(1, 1, 1, 1).byte()}),
        ("sinks must be a vector of 4", {"sinks": torch.ones(3)}),
        ("sinks must be float32", {"sinks": torch.ones(4).half()}),
        ("alibi_slopes must have shape", {"alibi_slopes": torch.ones(2, 3)}),
        ("global_index must have shape", {"global_index": torch.ones(3, 1).int()}),
        ("global_index must be int32", {"global_index": torch.ones(3)}),
        ("sink_tokens and global_tokens must be in", {"sink_tokens": -1}),
        ("softcap must not be negative", {"softcap": -1.0}),
    ],
)  # fmt: skip
def test_the_second_wall(backend: Backend, message: str, changed: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=message):
        raw(backend, **changed)
