"""The drop-in names: arguments and conventions of FlashAttention and of torch."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import functional

import pumice
from pumice import flash_attn

CASES = [torch.float32, torch.bfloat16]


def heads_first(*tensors):
    return [tensor.transpose(1, 2) for tensor in tensors]


def make(batch=2, queries=9, keys=9, heads=4, kv_heads=2, dim=16, value_dim=None, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (batch, queries, heads, dim),
        (batch, keys, kv_heads, dim),
        (batch, keys, kv_heads, value_dim or dim),
    ]
    return [torch.randn(*shape, generator=generator).to(**options) for shape in shapes]


def bottom_right(queries, keys, left, right):
    """The visible keys, by the definition of FlashAttention's documentation."""
    position = torch.arange(queries)[:, None] + keys - queries
    j = torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        seen &= j >= position - left
    if right >= 0:
        seen &= j <= position + right
    return seen


def plain(q, k, v, seen=None, scale=None, softcap=0.0, slopes=None):
    """Attention with its matrix of scores, in float64."""
    q, k, v = (tensor.double().transpose(1, 2) for tensor in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        queries, keys = scores.shape[-2:]
        distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        scores = scores - slopes.double()[..., None, None] * distance.abs()
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2)


def assert_close(out, reference):
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[out.dtype]
    torch.testing.assert_close(out.double(), reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", CASES)
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 12), (12, 5), (1, 70)])
@pytest.mark.parametrize(
    ("causal", "window"), [(False, (-1, -1)), (True, (-1, -1)), (True, (3, -1)), (False, (2, 1))]
)
def test_flash_attn_func(dtype, queries, keys, causal, window):
    q, k, v = make(queries=queries, keys=keys, dtype=dtype)
    out = pumice.flash_attn_func(q, k, v, causal=causal, window_size=window)
    left, right = window[0], 0 if causal else window[1]
    assert_close(out, plain(q, k, v, bottom_right(queries, keys, left, right)))


def test_every_argument_by_position():
    q, k, v = make(value_dim=24)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    out = pumice.flash_attn_func(q, k, v, 0.0, 0.3, True, (4, 0), 5.0, slopes, True, False)
    seen = bottom_right(9, 9, 4, 0)
    assert_close(out, plain(q, k, v, seen, scale=0.3, softcap=5.0, slopes=slopes))
    assert out.shape == (2, 9, 4, 24)


def test_the_packed_forms_are_the_same_function():
    q, k, v = make(kv_heads=4)
    out = pumice.flash_attn_func(q, k, v, causal=True)
    kv, qkv = torch.stack([k, v], dim=2), torch.stack([q, k, v], dim=2)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, kv, causal=True), out)
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), out)


LENGTHS = (5, 0, 9, 1)


def test_varlen_is_each_sequence_by_itself():
    lengths_k = (7, 3, 9, 0)
    q, _, _ = make(batch=1, queries=sum(LENGTHS))
    _, k, v = make(batch=1, keys=sum(lengths_k))
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (LENGTHS, lengths_k))
    out = pumice.flash_attn_varlen_func(q[0], k[0], v[0], cu_q, cu_k, 9, 9, causal=True)
    kv = torch.stack([k[0], v[0]], dim=1)
    packed = flash_attn.flash_attn_varlen_kvpacked_func(q[0], kv, cu_q, cu_k, 9, 9, causal=True)
    assert torch.equal(packed, out)
    for b in range(len(LENGTHS)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = pumice.flash_attn_func(q[:, rows], k[:, keys], v[:, keys], causal=True)
        assert torch.equal(out[rows], alone[0])
    assert not out[-1].any()  # no key, no weight


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_of_a_paged_cache(block_size, causal):
    """With a block_table k and v are the blocks of a pool, in any order."""
    lengths_k = (7, 3, 9, 0)
    q, _, _ = make(batch=1, queries=sum(LENGTHS))
    _, k, v = make(batch=1, keys=sum(lengths_k), value_dim=24)
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (LENGTHS, lengths_k))
    columns = -(-max(lengths_k) // block_size)
    order = torch.randperm(4 * columns, generator=torch.Generator().manual_seed(1))
    table = order.int().view(4, columns)
    pools = [torch.full((4 * columns, block_size, 2, x.shape[-1]), torch.nan) for x in (k, v)]
    for b, length in enumerate(lengths_k):
        for j in range(length):
            for pool, x in zip(pools, (k, v), strict=True):
                pool[table[b, j // block_size], j % block_size] = x[0, cu_k[b] + j]
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    options = {"causal": causal, "window_size": (4, -1), "softcap": 5.0, "alibi_slopes": slopes}
    out = pumice.flash_attn_varlen_func(
        q[0], *pools, cu_q, cu_k, 9, 9, block_table=table, **options
    )
    expected = pumice.flash_attn_varlen_func(q[0], k[0], v[0], cu_q, cu_k, 9, 9, **options)
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match=r"flash_attn_varlen_func: cu_seqlens_k must have shape"):
        pumice.flash_attn_varlen_func(q[0], *pools, cu_q, cu_k[1:], 9, 9, block_table=table)
    with pytest.raises(TypeError, match=r"paged_attention: block_table must be int32"):
        pumice.flash_attn_varlen_func(q[0], *pools, cu_q, cu_k, 9, 9, block_table=table.long())


def test_varlen_of_one_tensor():
    q, k, v = make(batch=1, queries=15, keys=15, kv_heads=4)
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    qkv = torch.stack([q[0], k[0], v[0]], dim=1)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 9, causal=True)
    assert torch.equal(
        out, pumice.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 9, 9, causal=True)
    )


# FlashAttention 2's own parameters, in order.
SIGNATURE = [
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size",
    "softcap",
    "alibi_slopes",
    "deterministic",
    "return_attn_probs",
]


@pytest.mark.parametrize(
    ("function", "operands"),
    [
        (flash_attn.flash_attn_func, "q k v"),
        (flash_attn.flash_attn_kvpacked_func, "q kv"),
        (flash_attn.flash_attn_qkvpacked_func, "qkv"),
        (flash_attn.flash_attn_varlen_qkvpacked_func, "qkv cu_seqlens max_seqlen"),
        (
            flash_attn.flash_attn_varlen_kvpacked_func,
            "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
        ),
        (
            flash_attn.flash_attn_varlen_func,
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k",
        ),
    ],
)
def test_the_parameters_are_those_of_flash_attention(function, operands):
    names = list(inspect.signature(function).parameters)
    wanted = operands.split() + SIGNATURE
    assert names[: len(wanted)] == wanted
    assert names[len(wanted) :] in ([], ["block_table"])


def test_refused():
    q, k, v = make(kv_heads=4)
    with pytest.raises(NotImplementedError, match=r"flash_attn_func: dropout_p = 0\.1.*pass 0\.0"):
        pumice.flash_attn_func(q, k, v, 0.1)
    with pytest.raises(NotImplementedError, match=r"never made.*return_lse=True"):
        pumice.flash_attn_func(q, k, v, return_attn_probs=True)
    cu = torch.tensor([0, 9, 18], dtype=torch.int32)
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    with pytest.raises(ValueError, match=r"qkv must have shape \[B, S, 3, H, D\]"):
        flash_attn.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv must have shape \[total, 2, H, D\]"):
        flash_attn.flash_attn_varlen_kvpacked_func(flat[0], flat[1], cu, cu, 9, 9)


# ---- torch's function


def sdpa64(q, k, v, *arguments, **options):
    return functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), *arguments, **options
    )


@pytest.mark.parametrize("dtype", CASES)
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 12), (12, 5), (1, 70), (130, 70)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_is_torchs(dtype, queries, keys, is_causal):
    q, k, v = heads_first(*make(queries=queries, keys=keys, dtype=dtype))
    out = pumice.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    assert out.dtype == dtype
    assert_close(out, sdpa64(q, k, v, is_causal=is_causal, enable_gqa=True))


@pytest.mark.parametrize(
    "shape", [(9, 12), (4, 9, 12), (1, 4, 9, 12), (2, 1, 9, 12), (1, 1, 1, 12)]
)
def test_sdpa_with_a_boolean_mask(shape):
    q, k, v = heads_first(*make(keys=12, kv_heads=4))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 0, :] = False  # a query that sees nothing
    out = pumice.scaled_dot_product_attention(q, k, v, mask, scale=0.4)
    assert_close(
        out,
        functional.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), mask, scale=0.4),
    )
    assert not out[:, :, 0].any()


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (4, 9), (9, 4)])
def test_sdpa_gradients_are_torchs(queries, keys):
    ours = [t.requires_grad_() for t in make(queries=queries, keys=keys)]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    out = pumice.scaled_dot_product_attention(*heads_first(*ours), is_causal=True, enable_gqa=True)
    reference = functional.scaled_dot_product_attention(
        *heads_first(*theirs), is_causal=True, enable_gqa=True
    )
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    (reference * weights).sum().backward()
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5)


def test_sdpa_without_a_batch():
    q, k, v = (t[0] for t in heads_first(*make(kv_heads=4)))
    mask = torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    out = pumice.scaled_dot_product_attention(q, k, v, mask)
    assert_close(
        out, functional.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), mask)
    )


def test_sdpa_compiles_as_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(
        pumice.scaled_dot_product_attention, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for queries, keys in ((9, 9), (12, 12), (6, 8)):
        q, k, v = heads_first(*make(queries=queries, keys=keys, kv_heads=4))
        out = compiled(q, k, v, is_causal=True)
        assert torch.equal(out, pumice.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_sdpa_refuses():
    q, k, v = heads_first(*make(kv_heads=4))
    sdpa = pumice.scaled_dot_product_attention
    with pytest.raises(NotImplementedError, match="dropout"):
        sdpa(q, k, v, dropout_p=0.5)
    with pytest.raises(TypeError, match=r"attn_mask must be bool.*float32.*`attn_mask == 0`"):
        sdpa(q, k, v, torch.zeros(9, 9))
    with pytest.raises(ValueError, match="attn_mask and is_causal exclude each other"):
        sdpa(q, k, v, torch.ones(9, 9, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match=r"4 heads and key 2; pass enable_gqa=True"):
        sdpa(q, k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match=r"query, key and value must have shape"):
        sdpa(q, k[0], v)
