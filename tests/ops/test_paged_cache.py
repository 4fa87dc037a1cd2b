"""cache_append and cache_copy_blocks, byte for byte; nothing else of the pool is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import paged_reference
import pumice
from backends import Backend
from cases import FLOATS

BYTES = (torch.float8_e4m3fn, torch.int8)


def raw(x: Tensor) -> Tensor:
    """The bits, so that NaNs compare."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def pool(blocks: int, size: int, heads: int, dim: int, dtype: torch.dtype, g: Any) -> Tensor:
    """Random bits, not one of them to be lost."""
    width = torch.empty(0, dtype=dtype).element_size()
    bits = torch.randint(0, 256, (blocks, size, heads, dim * width), generator=g, dtype=torch.uint8)
    return bits.view(dtype)


def append(backend: Backend, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    key, value, key_cache, value_cache, slots = (x.to(backend.device) for x in tensors)
    key_cache, value_cache = key_cache.clone(), value_cache.clone()
    moved = {k: tuple(x.to(backend.device) for x in v) if isinstance(v, tuple) else v
             for k, v in options.items()}  # fmt: skip
    moved = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in moved.items()}
    assert pumice.ops.cache_append(key, value, key_cache, value_cache, slots, **moved) is None
    return key_cache.cpu(), value_cache.cpu()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", [None, *BYTES])
@pytest.mark.parametrize("rotary", [None, "halves", "interleaved"])
def test_append(
    backend: Backend, dtype: torch.dtype, cache_dtype: torch.dtype | None, rotary: str | None
) -> None:
    stored = cache_dtype or dtype
    for seed, (heads, dim, value_dim, size, pairs) in enumerate(
        ((1, 16, 16, 16, 8), (2, 64, 32, 3, 32), (3, 33, 17, 1, 8), (1, 150, 70, 5, 70))
    ):
        g = torch.Generator().manual_seed(seed)
        tokens, blocks = 23, 40 // size + 3
        key = torch.randn(tokens, heads, dim, generator=g).to(dtype)
        value = torch.randn(tokens, heads, value_dim, generator=g).to(dtype)
        caches = (pool(blocks, size, heads, dim, stored, g),
                  pool(blocks, size, heads, value_dim, stored, g))  # fmt: skip
        slots = torch.randperm(blocks * size, generator=g)[:tokens]
        slots[::5] = torch.tensor([-1, -7, -1, -(2**40), -1])
        options: dict[str, Any] = {}
        if cache_dtype is not None:
            count = 1 if seed % 2 else heads
            options["k_scale"] = torch.rand(count, generator=g) * 0.02 + 0.005
            options["v_scale"] = torch.rand(heads + 1 - count, generator=g)[:1] * 0.02 + 0.005
        expected_key, expected_value = key.float(), value.float()
        if rotary is not None:
            angles = torch.rand(100, pairs, generator=g) * 6.3
            positions = torch.randint(0, 100, (tokens,), generator=g)
            options |= {"rotary": (angles.cos(), angles.sin(), positions),
                        "interleaved": rotary == "interleaved"}  # fmt: skip
            expected_key = paged_reference.rotate(
                expected_key, angles.cos()[positions], angles.sin()[positions],
                options["interleaved"],
            )  # fmt: skip
        written = append(backend, key, value, *caches, slots, **options)
        scales = (options.get("k_scale"), options.get("v_scale"))
        for cache, x, scale, result in zip(
            caches, (expected_key, expected_value), scales, written, strict=True
        ):
            expected = cache.clone()
            flat = expected.view(torch.uint8).view(blocks * size, heads, -1)
            for t, slot in enumerate(slots.tolist()):
                if slot >= 0:
                    row = paged_reference.stored(x[t : t + 1], scale, stored)
                    flat[slot] = row[0].contiguous().view(torch.uint8)
            assert torch.equal(raw(result), raw(expected))


@pytest.mark.parametrize("cache_dtype", BYTES)
def test_every_value_is_rounded_as_torch_does(backend: Backend, cache_dtype: torch.dtype) -> None:
    """All of float16 and bfloat16, ±Inf and NaN too; and of float32 what lies at the ties."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].unique()
    middle = (grid[1:] + grid[:-1]) / 2
    near = [middle, middle.nextafter(torch.tensor(1e9)), middle.nextafter(torch.tensor(-1e9)),
            torch.arange(-140, 140) / 2, torch.tensor([1e-45, -1e-45, 3e38, -0.0])]  # fmt: skip
    for values in (bits.view(torch.float16), bits.view(torch.bfloat16), torch.cat(near)):
        count = len(values) // 4 * 4
        x = values[:count].view(-1, 1, 4)
        slots = torch.arange(len(x))
        caches = torch.zeros(len(x), 1, 1, 4).to(cache_dtype)
        for scale in (1.0, 0.25):
            one = torch.tensor([scale])
            written = append(backend, x, x, caches, caches, slots, k_scale=one, v_scale=one)
            expected = paged_reference.stored(x.float(), one, cache_dtype).view(-1, 4)
            for result in written:
                result = result.view(-1, 4)
                if cache_dtype == torch.float8_e4m3fn:
                    nan = expected.float().isnan()
                    assert torch.equal(result.float().isnan(), nan)
                    assert torch.equal(raw(result)[~nan], raw(expected)[~nan])
                else:
                    assert torch.equal(result, expected)


def test_every_stored_byte_is_read_back(backend: Backend) -> None:
    """Attention to one key: its value, times the scale, for every byte."""
    for dtype in FLOATS:
        for cache_dtype in BYTES:
            stored = torch.arange(256, dtype=torch.uint8).view(cache_dtype).view(16, 1, 1, 16)
            key = torch.zeros(16, 1, 1, 16).to(cache_dtype)
            scale = torch.tensor([0.5], device=backend.device)
            out = pumice.ops.paged_attention(
                torch.zeros(16, 1, 1, 16, dtype=dtype, device=backend.device),
                key.to(backend.device), stored.to(backend.device),
                torch.arange(16, device=backend.device).int()[:, None],
                torch.ones(16, device=backend.device).int(), k_scale=scale, v_scale=scale,
            )  # fmt: skip
            expected = (stored.float() * 0.5).view(16, 1, 1, 16).to(dtype)
            torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_append_to_a_view(backend: Backend) -> None:
    """Both caches in one tensor, tokens in a fused projection's."""
    g = torch.Generator().manual_seed(0)
    both = pool(4, 8, 3, 8, torch.float16, g).view(4, 2, 4, 3, 8)
    fused = torch.randn(6, 9, 8, generator=g).half().to(backend.device)
    slots = torch.tensor([3, 15, -1, 0, 7, 9])
    device_both = both.to(backend.device)
    pumice.ops.cache_append(
        fused[:, 3:6], fused[:, 6:], device_both[:, 0], device_both[:, 1], slots.to(backend.device)
    )
    expected = both.clone()
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // 4, 0, slot % 4] = fused[t, 3:6].cpu()
            expected[slot // 4, 1, slot % 4] = fused[t, 6:].cpu()
    assert torch.equal(raw(device_both.cpu()), raw(expected))


@pytest.mark.parametrize("dtype", [*FLOATS, *BYTES])
@pytest.mark.parametrize("together", [False, True])
def test_copy_blocks(backend: Backend, dtype: torch.dtype, together: bool) -> None:
    g = torch.Generator().manual_seed(0)
    for size, dim in ((1, 3), (16, 64), (5, 33)):
        both = pool(24, size, 2, dim, dtype, g).view(12, 2, size, 2, dim)
        pairs = torch.tensor([[3, 7], [-1, 2], [3, 0], [5, 5], [11, 10], [-4, -4]])
        held = both.to(backend.device)
        key, value = (held[:, 0], held[:, 1])
        if not together:
            key, value = key.clone(), value.clone()
        assert pumice.ops.cache_copy_blocks(key, value, pairs.to(backend.device)) is None
        expected = raw(both).clone()
        for source, destination in ((3, 7), (3, 0), (11, 10)):
            expected[destination] = expected[source]
        assert torch.equal(raw(key.cpu()), expected[:, 0])
        assert torch.equal(raw(value.cpu()), expected[:, 1])


def test_nothing_to_write(backend: Backend) -> None:
    cache = torch.ones(2, 4, 1, 8, device=backend.device)
    nothing = torch.empty(0, 1, 8, device=backend.device)
    pumice.ops.cache_append(
        nothing, nothing, cache, cache, torch.empty(0, dtype=torch.int64, device=backend.device)
    )
    pumice.ops.cache_copy_blocks(
        cache, cache, torch.empty(0, 2, dtype=torch.int64, device=backend.device)
    )
    assert (cache == 1).all()
