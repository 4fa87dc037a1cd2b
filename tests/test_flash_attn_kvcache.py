"""The drop-in names over a cache, against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attention_reference as reference
import pumice
from paged_reference import rotate


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out, _ = reference.attention(q[None], k[None], v[None], reference.Options(**options))
    return out[0].float()


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("rotary", [None, "interleaved", "halves"])
@pytest.mark.parametrize("options", [{"causal": True}, {}, {"window": (5, 0)}])
def test_append_and_attend(paged: bool, rotary: str | None, options: dict[str, Any]) -> None:
    lengths, new, capacity, size = [3, 0, 11], 4, 18, 6
    q, k, v = draw(3, new, 4, 16), draw(3, new, 2, 16), draw(3, new, 2, 8)
    k_cache, v_cache = draw(3, capacity, 2, 16), draw(3, capacity, 2, 8)
    angles = torch.rand(20, 6, generator=torch.Generator().manual_seed(1)) * 6
    interleaved = rotary == "interleaved"
    expected, appended = [], []
    for b, length in enumerate(lengths):
        keys, queries = k[b], q[b]
        if rotary is not None:
            at = length + torch.arange(new)
            keys = rotate(keys, angles.cos()[at], angles.sin()[at], interleaved)
            at = at if options else torch.full_like(at, length)
            queries = rotate(queries, angles.cos()[at], angles.sin()[at], interleaved)
        keys = torch.cat([k_cache[b, :length], keys])
        appended.append(keys)
        expected.append(exact(queries, keys, torch.cat([v_cache[b, :length], v[b]]), **options))
    call = {"causal": options.get("causal", False), "window_size": options.get("window", (-1, -1))}
    if rotary is not None:
        call |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(),
                 "rotary_interleaved": interleaved}  # fmt: skip
    if paged:
        order = torch.tensor([[4, 0, 7], [2, 8, 1], [3, 5, 6]])
        pool_k, pool_v = torch.empty(9, size, 2, 16), torch.empty(9, size, 2, 8)
        pool_k[order], pool_v[order] = (
            k_cache.unflatten(1, (3, size)),
            v_cache.unflatten(1, (3, size)),
        )
        call["block_table"] = order.int()
    else:
        pool_k, pool_v = k_cache.clone(), v_cache.clone()
    out, lse = pumice.flash_attn_with_kvcache(
        q, pool_k, pool_v, k, v, cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        return_softmax_lse=True, **call,
    )  # fmt: skip
    assert lse.shape == (3, 4, new)
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-5)
    held = pool_k[order].flatten(1, 2) if paged else pool_k
    for b, keys in enumerate(appended):
        torch.testing.assert_close(held[b, : len(keys)], keys, rtol=1e-6, atol=1e-6)
        assert torch.equal(held[b, len(keys) :], k_cache[b, len(keys) :])


def test_a_cache_of_whole_sequences() -> None:
    """No k and v; all of the cache, one length for all, and rows chosen."""
    q, k, v = draw(2, 1, 4, 16), draw(5, 9, 2, 16), draw(5, 9, 2, 16)
    rows = torch.tensor([4, 1], dtype=torch.int32)
    for lengths, count in ((None, 9), (6, 6)):
        out = pumice.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, cache_batch_idx=rows, causal=True
        )
        expected = [exact(q[b], k[r, :count], v[r, :count]) for b, r in enumerate(rows.tolist())]
        torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-5)
    whole = pumice.flash_attn_with_kvcache(q, k[:2], v[:2], num_splits=7)
    torch.testing.assert_close(whole[0], exact(q[0], k[0], v[0]), rtol=1e-5, atol=1e-5)


Q, CACHE = draw(2, 1, 4, 16), draw(2, 9, 2, 16)


@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (NotImplementedError, "cache_leftpad is given", {"cache_leftpad": torch.zeros(2).int()}),
        (ValueError, "k and v belong together", {"k": CACHE[:, :1]}),
        (ValueError, "rotary_cos and rotary_sin .* need k", {"rotary_cos": Q, "rotary_sin": Q}),
        (ValueError, "k_cache must have the batch of q, 2", {"k_cache": CACHE[:1]}),
        (ValueError, "block_table and cache_batch_idx exclude each other",
         {"block_table": torch.zeros(2, 1).int(), "cache_batch_idx": torch.zeros(2).int()}),
        (ValueError, r"cache_batch_idx must have shape \[2\]",
         {"cache_batch_idx": torch.zeros(3).int()}),
        (TypeError, "cache_seqlens must be int32", {"cache_seqlens": torch.ones(2)}),
        (ValueError, "q must have 4 dimensions", {"q": Q[0]}),
        (RuntimeError, r"slot_mapping\[1\] must be below",
         {"k": CACHE[:, :2], "v": CACHE[:, :2], "cache_seqlens": 8}),
    ],
)  # fmt: skip
def test_refusals(error: type[Exception], message: str, changed: dict[str, Any]) -> None:
    given: dict[str, Any] = {"q": Q, "k_cache": CACHE.clone(), "v_cache": CACHE.clone()}
    with pytest.raises(error, match=message):
        pumice.flash_attn_with_kvcache(**(given | changed))


@pytest.mark.parametrize("kind", ["auto", "fp8", "fp8_e4m3"])
def test_reshape_and_cache_flash(kind: str) -> None:
    key, value = draw(7, 2, 8).bfloat16(), draw(7, 2, 8).bfloat16()
    slots = torch.tensor([5, -1, 0, 7, 3])  # of seven tokens two are padding
    one = torch.tensor(0.01)
    dtype = torch.bfloat16 if kind == "auto" else torch.uint8
    caches = [torch.zeros(2, 4, 2, 8, dtype=dtype) for _ in range(2)]
    pumice.reshape_and_cache_flash(key, value, *caches, slots, kind, one, one)
    for cache, x in zip(caches, (key, value), strict=True):
        expected = torch.zeros(8, 2, 8, dtype=dtype)
        if kind != "auto":
            x = (x.float() / one).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        for t in (0, 2, 3, 4):
            expected[slots[t]] = x[t]
        assert torch.equal(cache.view(8, 2, 8), expected)
    with pytest.raises(ValueError, match=r"kv_cache_dtype must be .* not 'fp8_e5m2'"):
        pumice.reshape_and_cache_flash(key, value, *caches, slots, "fp8_e5m2", one, one)
