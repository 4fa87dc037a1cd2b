"""Shapes that take every way through attention to a paged cache on CUDA: each tile, parts of keys.

Where the cache is of the query's dtype the bits are those of flash attention to the same keys; a
cache of bytes has tiles of its own, against float64.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import pumice
from backends import Backend
from paged_cases import PagedCase, check, inputs, poison, run

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
FLOAT8, INT8 = torch.float8_e4m3fn, torch.int8


@pytest.fixture(autouse=True)
def _cuda_kernels(backend: Backend) -> None:
    if backend.name == "cpu":
        pytest.skip("the tiles of the CUDA kernels")


def case(queries: int, keys: int, dim: int, value_dim: int, dtype: torch.dtype) -> PagedCase:
    return PagedCase(lengths=((queries, keys),), dim=dim, value_dim=value_dim, dtype=dtype,
                     heads=1, packed=False)  # fmt: skip


# More than 16 rows, and blocks of keys enough for the ring of tiles to come round.
LONG = {
    "64": case(150, 300, 64, 64, HALF),
    "96": replace(case(40, 300, 96, 80, BRAIN), block_size=7),
    "128": replace(case(130, 330, 128, 128, BRAIN), mask="window"),
    "128, longer values": replace(case(40, 290, 64, 112, HALF), sinks=True, mask="streaming"),
    "192 with values of 128": case(70, 330, 192, 128, BRAIN),
    "256": case(70, 330, 256, 256, HALF),
    "packed heads": replace(case(30, 250, 64, 64, HALF), heads=6, kv_heads=2, alibi="H"),
    "tree": replace(case(40, 190, 96, 96, BRAIN), heads=2, mask="tree"),
    "softcap": replace(case(40, 140, 32, 32, BRAIN), heads=2, softcap=3.0),
    "two parts of keys": replace(case(20, 1100, 128, 128, BRAIN), sinks=True),
}
SHORT = {
    "64": case(1, 300, 64, 64, HALF),
    "96": replace(case(1, 420, 96, 96, BRAIN), block_size=5),
    "128, a group": replace(case(2, 420, 128, 128, BRAIN), heads=8, sinks=True),
    "128, padded": replace(case(3, 130, 80, 112, HALF), heads=2, mask="window"),
    "256": case(5, 300, 256, 208, BRAIN),
    "fewer keys than warps": case(3, 3, 64, 64, BRAIN),
    "parts": replace(case(1, 1300, 128, 128, BRAIN), heads=4, sinks=True),
    "parts, wide": replace(case(7, 600, 256, 256, HALF), heads=2, alibi="H", sinks=True),
}
TILES = {
    **{f"tile {name}": chosen for name, chosen in LONG.items()},
    **{f"short tile {name}": chosen for name, chosen in SHORT.items()},
}
FP32 = {
    "64": replace(case(20, 90, 64, 64, SINGLE), sinks=True),
    "128": replace(case(3, 70, 100, 128, SINGLE), heads=2, softcap=3.0),
    "256": replace(case(33, 70, 256, 250, SINGLE), mask="window"),
    "parts": replace(case(1, 600, 16, 9, SINGLE), heads=2, sinks=True),
}


@pytest.mark.parametrize("chosen", TILES.values(), ids=TILES.keys())
def test_bits_of_flash_attention(backend: Backend, chosen: PagedCase) -> None:
    """One schedule, whether keys are contiguous or found by the table: equal bits."""
    given = inputs(chosen)
    ((out, lse),) = run(backend, given)
    (table,), ((_, keys),) = given.table.long(), chosen.lengths
    j = torch.arange(keys)
    blocks = table[j // chosen.block_size].clamp(min=0)
    key, value = (
        x[blocks, j % chosen.block_size][None].nan_to_num()
        for x in (given.cache.key, given.cache.value)
    )
    keywords = {"causal": True} | {k: v for k, v in given.keywords.items() if "scale" not in k}
    if given.trees is not None:
        mask = torch.ones(1, 1, chosen.lengths[0][0], keys, dtype=torch.bool)
        mask[..., keys - len(given.trees[0]) :] = given.trees[0]
        keywords["mask"] = mask
    moved = [x.to(backend.device) for x in (given.queries[0][None], key, value)]
    expected, expected_lse = pumice.ops.flash_attention(
        *moved, return_lse=True,
        **{k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in keywords.items()},
    )  # fmt: skip
    assert torch.equal(out, expected[0].cpu())
    assert torch.equal(lse, expected_lse[0].cpu())


@pytest.mark.parametrize("stored", [FLOAT8, INT8])
@pytest.mark.parametrize("chosen", TILES.values(), ids=TILES.keys())
def test_caches_of_bytes(backend: Backend, chosen: PagedCase, stored: torch.dtype) -> None:
    check(backend, replace(chosen, cache_dtype=stored, scales="head"))
    # The other type of the query has another way to widen bytes.
    other = HALF if chosen.dtype == BRAIN else BRAIN
    if chosen in (LONG["128"], SHORT["64"]):
        check(backend, replace(chosen, cache_dtype=stored, dtype=other))


@pytest.mark.parametrize("stored", [FLOAT8, INT8])
@pytest.mark.parametrize("chosen", FP32.values(), ids=FP32.keys())
def test_caches_of_bytes_fp32(backend: Backend, chosen: PagedCase, stored: torch.dtype) -> None:
    check(backend, replace(chosen, cache_dtype=stored, scales="head"))


@pytest.mark.parametrize("stored", [FLOAT8, INT8])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
def test_every_byte(backend: Backend, dtype: torch.dtype, stored: torch.dtype) -> None:
    """A single key gives its value as the result, and to one-hot queries itself as scores."""
    every = torch.arange(256, dtype=torch.uint8).view(stored)
    exact = every.to(torch.float32)
    finite = torch.where(exact.isnan(), 0, every.view(torch.uint8)).view(stored)
    key, value = (x.view(1, 1, 1, 256).to(backend.device) for x in (finite, every))
    one_hot = torch.eye(256, dtype=dtype).view(16, 1, 16, 256).to(backend.device)
    table = torch.zeros(16, 1, dtype=torch.int32, device=backend.device)
    one = torch.ones(1, device=backend.device)
    options = {"softmax_scale": 1.0, "k_scale": one, "v_scale": one * 0.5, "return_lse": True}
    out, lse = pumice.ops.paged_attention(
        one_hot, key, value, table, torch.ones_like(table[:, 0]), **options
    )
    # lse is a logarithm to base 2 times ln 2.
    scores = exact.nan_to_num(0.0)
    torch.testing.assert_close(lse.cpu().flatten(), scores, rtol=2e-7, atol=1e-9)
    expected = (exact * 0.5).to(dtype).expand(16, 1, 16, 256)
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    assert torch.equal(out.cpu().nan_to_num(7e3), expected.nan_to_num(7e3))
    _, lse = pumice.ops.paged_attention(
        one_hot, value, value, table, torch.ones_like(table[:, 0]), **options
    )
    assert lse.isnan().all() == (stored == FLOAT8)  # 0 · NaN


@pytest.mark.parametrize("queries", [3, 20])
def test_nan_bytes_between_visible_ones(backend: Backend, queries: int) -> None:
    """A NaN byte that the last query sees, and its neighbours in the tile do not."""
    chosen = replace(case(queries, 200, 64, 64, BRAIN), heads=2, cache_dtype=FLOAT8)
    given = inputs(chosen)
    ((clean, clean_lse),) = run(backend, given)
    last = given.cache.value.view(torch.uint8)[int(given.table[0, 199 // 16]), 199 % 16, 0]
    last[9], last[36] = 0xFF, 0x7F
    ((out, lse),) = run(backend, given)
    assert torch.equal(out[-1].isnan().nonzero(), torch.tensor([[0, 9], [0, 36], [1, 9], [1, 36]]))
    torch.testing.assert_close(out[:-1], clean[:-1], rtol=0, atol=2e-2)
    assert torch.equal(lse, clean_lse)


@pytest.mark.parametrize("stored", [FLOAT8, INT8])
@pytest.mark.parametrize("scale", [0.0, -0.02, torch.nan])
def test_strange_scales(backend: Backend, stored: torch.dtype, scale: float) -> None:
    """What a scale that is not positive makes of keys and values, plain maths makes of them too."""
    given = inputs(replace(case(3, 70, 64, 64, HALF), cache_dtype=stored))
    scales = torch.tensor([scale])
    given = replace(
        given,
        keywords=given.keywords | {"k_scale": scales, "v_scale": scales},
        cache=replace(given.cache, k_scale=scales, v_scale=scales),
    )
    ((out, _),), ((exact, _),) = run(backend, given), given.exact()
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("stored", [None, FLOAT8])
def test_padding_of_a_table_is_no_address(
    backend: Backend, stored: torch.dtype | None, queries: int
) -> None:
    """A table that ends with its sequence, in a pool that ends with its last block.

    Tiles reach past both, by up to a tile of keys: the emulator's bounds catch a read there. What
    lies in the last block past the sequence's end is NaN.
    """
    for block_size in (1, 16, 64):
        keys = 3 * 64 + 1
        chosen = replace(case(queries, keys, 64, 64, BRAIN), block_size=block_size,
                         cache_dtype=stored)  # fmt: skip
        given = inputs(chosen)
        blocks = -(-keys // block_size)
        used = given.table[0, :blocks].long()
        cache = replace(given.cache, key=given.cache.key[used], value=given.cache.value[used])
        tight = replace(given, cache=cache, table=torch.arange(blocks, dtype=torch.int32)[None])
        unused = torch.zeros(blocks, block_size, dtype=torch.bool)
        unused[-1, (keys - 1) % block_size + 1 :] = True
        poison(cache.key, cache.value, unused)
        ((out, lse),), ((expected, expected_lse),) = run(backend, tight), run(backend, given)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
