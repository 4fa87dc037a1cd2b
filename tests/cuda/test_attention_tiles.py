"""Shapes that take every way through flash_forward, which small random shapes do not reach.

The names say what the emulated device chooses (4 SMs); on a GPU the same shapes are merely unusual.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import pumice
from attention_cases import AttentionCase, check, inputs, run
from backends import Backend

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def case(queries: int, keys: int, dim: int, value_dim: int, dtype: torch.dtype) -> AttentionCase:
    return AttentionCase(
        batch=1, queries=queries, keys=keys, heads=1, dim=dim, value_dim=value_dim, dtype=dtype
    )


# More than 16 rows; more than three blocks of keys, so that the ring of tiles comes round.
TILES = {
    "64": replace(case(150, 300, 64, 64, HALF), mask="causal"),
    # The first query sees all keys of a block but its last.
    "64, the diagonal just inside a block": replace(case(130, 192, 64, 64, HALF), mask="causal"),
    "64, padded": case(40, 270, 24, 40, BRAIN),
    "96": replace(case(40, 200, 96, 80, BRAIN), mask="left"),
    "128": replace(case(130, 330, 128, 128, BRAIN), mask="causal"),
    "128, longer values": replace(case(40, 140, 56, 128, HALF), sinks=True),
    "192 with values of 128": replace(case(70, 330, 192, 128, BRAIN), mask="causal"),
    "256": replace(case(70, 330, 256, 256, HALF), mask="causal"),
    "256, values longer than 128": case(20, 130, 160, 136, BRAIN),
    "packed heads": replace(case(30, 150, 64, 64, HALF), heads=6, kv_heads=2, alibi="H"),
    "bits of each head": replace(
        case(30, 150, 64, 64, BRAIN), heads=4, kv_heads=2, mask="bits of heads"
    ),
    "softcap and slopes": replace(
        case(40, 140, 32, 32, BRAIN), heads=2, softcap=3.0, alibi="BH", mask="causal window"
    ),
    "negative scale": replace(case(20, 140, 32, 32, HALF), softmax_scale=-0.3),
    "scale zero": replace(case(20, 140, 32, 32, HALF), softmax_scale=0.0),
    "odd head dims": replace(case(20, 70, 33, 7, BRAIN), layout="sliced"),
    # The row tile has 128 rows; most warps have none, or are above the diagonal.
    "two parts of keys": replace(case(20, 1100, 64, 64, BRAIN), mask="causal", sinks=True),
    "two parts, wide": replace(case(20, 1100, 256, 256, HALF), mask="causal"),
    "two parts, globals": replace(case(20, 1100, 32, 20, BRAIN), mask="global list"),
}

# Up to 16 rows: warps along the keys.
SHORT_TILES = {
    "64": replace(case(1, 300, 64, 64, HALF), mask="causal"),
    "128, a group": replace(case(2, 300, 128, 128, BRAIN), heads=8, sinks=True),
    "128, padded": replace(case(3, 130, 72, 100, HALF), heads=2, mask="window"),
    "256": case(5, 300, 256, 200, BRAIN),
    "fewer keys than warps": case(4, 3, 64, 64, BRAIN),
    "parts": replace(case(1, 1300, 64, 64, BRAIN), heads=4, sinks=True, mask="causal"),
    "parts, windowed": replace(case(2, 1300, 32, 32, HALF), mask="streaming", sinks=True),
    "parts, bits": replace(case(4, 1030, 128, 97, BRAIN), heads=2, mask="bits"),
    "parts, wide": replace(case(7, 600, 256, 256, HALF), heads=2, alibi="H", sinks=True),
}

FP32 = {
    "64": replace(case(40, 150, 64, 64, SINGLE), mask="causal", sinks=True),
    "128": replace(case(33, 70, 100, 128, SINGLE), heads=2, softcap=3.0),
    "256": replace(case(33, 100, 256, 250, SINGLE), mask="window", layout="sliced"),
    "parts": replace(case(5, 600, 16, 9, SINGLE), heads=2, sinks=True, mask="causal"),
    "bits of each head": replace(
        case(30, 70, 16, 16, SINGLE), heads=4, kv_heads=2, mask="bits of heads"
    ),
}

ALL = {
    **{f"tile {name}": chosen for name, chosen in TILES.items()},
    **{f"short tile {name}": chosen for name, chosen in SHORT_TILES.items()},
    **{f"fp32 tile {name}": chosen for name, chosen in FP32.items()},
}


@pytest.fixture(autouse=True)
def _cuda_kernels(backend: Backend) -> None:
    if backend.name == "cpu":
        pytest.skip("the tiles of the CUDA kernels")


@pytest.mark.parametrize("chosen", ALL.values(), ids=ALL.keys())
def test_attention(backend: Backend, chosen: AttentionCase) -> None:
    check(backend, chosen)


@pytest.mark.parametrize("dtype", [BRAIN, SINGLE])
def test_packed_sequences_of_all_kinds(backend: Backend, dtype: torch.dtype) -> None:
    """One call whose sequences take the short tile, the long one and parts: each as if alone."""
    packed = AttentionCase(batch=7, queries=40, keys=1100, heads=2, dtype=dtype, packed=True)
    check(backend, replace(packed, mask="causal", sinks=True))


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_hidden_values_between_visible_ones(backend: Backend, queries: int, bad: float) -> None:
    """A value that one row of a tile sees and its neighbours do not, in a part of many keys."""
    g = torch.Generator().manual_seed(5)
    keys = 1100
    query = torch.randn(1, queries, 2, 32, generator=g).to(BRAIN)
    key, value = (torch.randn(1, keys, 2, 32, generator=g).to(BRAIN) for _ in range(2))
    mask = torch.rand(1, 1, queries, keys, generator=g) < 0.7
    mask[..., 333] = False
    mask[0, 0, 0, 333] = True
    moved = [x.to(backend.device) for x in (query, key, value, mask)]
    clean = pumice.ops.flash_attention(*moved[:3], mask=moved[3]).cpu()
    poisoned = value.clone()
    poisoned[0, 333, 1, 9] = bad
    moved[2] = poisoned.to(backend.device)
    out = pumice.ops.flash_attention(*moved[:3], mask=moved[3]).cpu()
    expected = clean.clone()
    expected[0, 0, 1, 9] = bad
    assert torch.equal(out.nan_to_num(7e4), expected.nan_to_num(7e4))


def test_repeats_bit_for_bit(backend: Backend) -> None:
    given = inputs(SHORT_TILES["parts"])
    first = run(backend, given)[0]
    for _ in range(2):
        again = run(backend, given)[0]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
