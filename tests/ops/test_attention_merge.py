"""merge_attention: attention to parts of the keys makes attention to all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attention_reference as reference
import pumice
from backends import Backend
from cases import FLOATS, surrounded


def merged(outs: Tensor, lses: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The definition."""
    lses = lses.to(dtype)
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.where(lses == -torch.inf, 0.0, torch.exp(lses - lse))
    return (weights.mT[..., None] * outs.to(dtype)).sum(0), lse


def parts(*shape: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """outs and lses of which some saw nothing, and a row of which none saw anything."""
    g = torch.Generator().manual_seed(0)
    count, batch, length, heads, _ = shape
    outs = torch.randn(*shape, generator=g).to(dtype)
    lses = torch.randn(count, batch, heads, length, generator=g) * 4
    hidden = torch.rand(lses.shape, generator=g) < 0.2
    hidden[:, :, :, :1] = True
    lses[hidden] = -torch.inf
    outs[hidden.mT] = 0
    return outs.to(device), lses.to(device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 2, 5, 3, 8), (2, 1, 3, 1, 1), (3, 2, 17, 4, 40),
                                   (7, 1, 9, 2, 256), (33, 1, 2, 2, 67)])  # fmt: skip
def test_merges(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    outs, lses = parts(*shape, dtype=dtype, device=backend.device)
    out, lse = pumice.ops.merge_attention(outs, lses)
    assert (out.shape, out.dtype) == (outs.shape[1:], dtype)
    assert (lse.shape, lse.dtype) == (lses.shape[1:], torch.float32)
    assert out.is_contiguous()
    exact, exact_lse = merged(outs.cpu(), lses.cpu())
    plain, _ = merged(outs.cpu(), lses.cpu(), torch.float32)
    reference.assert_as_exact_as_plain(out, exact, plain.to(dtype), reference.rounding(dtype))
    reference.assert_as_exact_as_plain(lse, exact_lse, exact_lse, 2.0**-19)
    assert not out[:, 0].any()
    assert (lse[..., 0] == -torch.inf).all()


def test_one_part_is_itself(backend: Backend) -> None:
    outs, lses = parts(1, 2, 5, 3, 8, dtype=torch.float16, device=backend.device)
    out, lse = pumice.ops.merge_attention(outs, lses)
    assert torch.equal(out, outs[0])
    assert torch.equal(lse, lses[0])


def test_keys_in_two_parts(backend: Backend) -> None:
    """Cascade attention: a shared prefix, and what is each sequence's own."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, 4, 16, generator=g).to(backend.device)
    k = torch.randn(2, 90, 2, 16, generator=g).to(backend.device)
    sinks = torch.randn(4, generator=g).to(backend.device)
    expected, expected_lse = pumice.ops.flash_attention(
        q, k, k, causal=True, sinks=sinks, return_lse=True
    )
    first = pumice.ops.flash_attention(q, k[:, :60], k[:, :60], return_lse=True)
    last = pumice.ops.flash_attention(
        q, k[:, 60:], k[:, 60:], causal=True, sinks=sinks, return_lse=True
    )
    outs, lses = (torch.stack(pair) for pair in zip(first, last, strict=True))
    out, lse = pumice.ops.merge_attention(outs, lses)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_strides_and_surroundings(backend: Backend) -> None:
    outs, lses = parts(3, 2, 17, 4, 40, dtype=torch.bfloat16, device=backend.device)
    expected = pumice.ops.merge_attention(outs, lses)
    others = [
        (outs.transpose(0, 1).contiguous().transpose(0, 1), lses.mT.contiguous().mT),
        (torch.stack([outs, outs], -1)[..., 0], torch.stack([lses, lses], -1)[..., 0]),
        (surrounded(outs), surrounded(lses)),
    ]
    for given in others:
        for result, wanted in zip(pumice.ops.merge_attention(*given), expected, strict=True):
            assert torch.equal(result, wanted)


@pytest.mark.parametrize("shape", [(2, 0, 5, 3, 8), (2, 2, 0, 3, 8), (2, 2, 5, 0, 8)])
def test_empty(backend: Backend, shape: tuple[int, ...]) -> None:
    outs = torch.zeros(shape, device=backend.device)
    lses = torch.zeros(*shape[:2], shape[3], shape[2], device=backend.device)
    out, lse = pumice.ops.merge_attention(outs, lses)
    assert out.shape == shape[1:]
    assert lse.shape == lses.shape[1:]


def test_a_part_that_saw_nothing_may_hold_anything(backend: Backend) -> None:
    outs, lses = parts(3, 2, 6, 2, 8, dtype=torch.float32, device=backend.device)
    expected = pumice.ops.merge_attention(outs, lses)
    outs[(lses == -torch.inf).mT] = torch.nan
    for result, wanted in zip(pumice.ops.merge_attention(outs, lses), expected, strict=True):
        assert torch.equal(result, wanted)


def test_gradients(backend: Backend) -> None:
    gradients = []
    for function in (pumice.ops.merge_attention, merged):
        outs, lses = parts(3, 2, 6, 2, 8, dtype=torch.float32, device=backend.device)
        outs.requires_grad_()
        lses.requires_grad_()
        out, lse = function(outs, lses)
        seen = torch.where(lse == -torch.inf, 0.0, lse)
        (
            (out * torch.linspace(-1, 1, 8, device=backend.device)).sum() + seen.sin().sum()
        ).backward()
        gradients.append((outs.grad, lses.grad))
    (d_outs, d_lses), (exact_outs, exact_lses) = gradients
    torch.testing.assert_close(d_outs, exact_outs)
    torch.testing.assert_close(d_lses, torch.nan_to_num(exact_lses))
