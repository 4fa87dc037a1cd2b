"""Boolean masks as bits: pack_attention_mask against the layout's definition, and its use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pumice
from backends import Backend


def defined(mask: Tensor) -> tuple[Tensor, Tensor]:
    """bits and blocks of a [B, H, S_q, S_k] mask, square by square and word by word."""
    batch, heads, queries, keys = mask.shape
    words, columns = -(-keys // 32), -(-keys // 64)
    rows = -(-queries // 64)
    bits = torch.zeros(batch, heads, queries, words, dtype=torch.int64)
    for j in range(keys):
        bits[..., j // 32] |= mask[..., j].long() << (j % 32)
    bits = torch.where(bits >= 2**31, bits - 2**32, bits).int()
    blocks = torch.zeros(batch, heads, rows, columns, dtype=torch.uint8)
    for m in range(rows):
        for n in range(columns):
            square = mask[..., m * 64 : m * 64 + 64, n * 64 : n * 64 + 64].flatten(-2)
            blocks[..., m, n] = square.any(-1).byte() + square.all(-1).byte()
    return bits, blocks


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Squares of which some are all, some none."""
    g = torch.Generator().manual_seed(seed)
    *leading, queries, keys = shape
    kinds = torch.randint(0, 3, (*leading, -(-queries // 64), -(-keys // 64)), generator=g)
    kinds = kinds.repeat_interleave(64, -2).repeat_interleave(64, -1)[..., :queries, :keys]
    return (kinds == 2) | ((kinds == 1) & (torch.rand(shape, generator=g) < 0.7))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 31), (63, 33), (64, 64), (65, 97),
                                               (130, 200), (3, 260)])  # fmt: skip
@pytest.mark.parametrize("leading", [(1, 1), (2, 3)])
def test_packs(backend: Backend, queries: int, keys: int, leading: tuple[int, int]) -> None:
    mask = drawn(*leading, queries, keys)
    packed = pumice.ops.pack_attention_mask(mask.to(backend.device))
    bits, blocks = defined(mask)
    assert packed.shape == mask.shape
    assert (packed.bits.dtype, packed.blocks.dtype) == (torch.int32, torch.uint8)
    assert torch.equal(packed.bits.cpu(), bits)
    assert torch.equal(packed.blocks.cpu(), blocks)


def test_any_strides_and_ranks(backend: Backend) -> None:
    mask = drawn(70, 90).to(backend.device)
    packed = pumice.ops.pack_attention_mask(mask)
    assert packed.shape == (1, 1, 70, 90)
    others = (
        mask.T.contiguous().T,
        torch.stack([mask, ~mask], dim=-1)[..., 0],
        torch.nn.functional.pad(mask, (3, 2))[:, 3:-2],
        mask[None],
    )
    for other in others:
        again = pumice.ops.pack_attention_mask(other)
        assert torch.equal(again.bits, packed.bits)
        assert torch.equal(again.blocks, packed.blocks)
    padding = drawn(2, 1, 1, 90).to(backend.device)
    expanded = pumice.ops.pack_attention_mask(padding.expand(2, 1, 70, 90))
    copied = pumice.ops.pack_attention_mask(padding.expand(2, 1, 70, 90).contiguous())
    assert torch.equal(expanded.bits, copied.bits)
    assert torch.equal(expanded.blocks, copied.blocks)


@pytest.mark.parametrize("shape", [(0, 1, 3, 5), (2, 1, 0, 5), (2, 1, 3, 0), (1, 1, 0, 0)])
def test_empty(backend: Backend, shape: tuple[int, ...]) -> None:
    packed = pumice.ops.pack_attention_mask(
        torch.ones(shape, dtype=torch.bool, device=backend.device)
    )
    assert packed.bits.shape == (*shape[:3], -(-shape[3] // 32))
    assert packed.blocks.shape == (*shape[:2], -(-shape[2] // 64), -(-shape[3] // 64))


def test_a_packed_mask_is_the_mask(backend: Backend) -> None:
    """The same bits of the result, whether the mask was packed before or is broadcast."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 70, 4, 16, generator=g).to(backend.device)
    k = torch.randn(2, 90, 2, 16, generator=g).to(backend.device)
    shapes = ((1, 90), (4, 70, 90), (2, 1, 1, 90), (70, 90), (2, 4, 70, 90), (1, 4, 1, 90))
    for shape in shapes[: 3 if backend.name == "emulated" else None]:
        mask = drawn(*shape).to(backend.device)
        whole = mask.expand(2, 4, 70, 90)
        expected = pumice.ops.flash_attention(q, k, k, mask=whole, return_lse=True)
        small = pumice.ops.flash_attention(q, k, k, mask=mask, return_lse=True)
        packed = pumice.ops.pack_attention_mask(whole[:1] if len(shape) < 4 else whole)
        again = pumice.ops.flash_attention(q, k, k, mask=packed.to(backend.device), return_lse=True)
        for results in (small, again):
            assert torch.equal(results[0], expected[0])
            assert torch.equal(results[1], expected[1])


def test_bits_and_options_agree(backend: Backend) -> None:
    """Causality and a window by their options, and as a mask."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 70, 2, 16, generator=g).to(backend.device)
    k = torch.randn(1, 150, 2, 16, generator=g).to(backend.device)
    p, j = torch.arange(70)[:, None] + 80, torch.arange(150)[None]
    mask = ((j <= p) & (j >= p - 30)).to(backend.device)
    expected = pumice.ops.flash_attention(q, k, k, causal=True, window=(30, 0))
    out = pumice.ops.flash_attention(q, k, k, mask=mask)
    torch.testing.assert_close(out, expected)
