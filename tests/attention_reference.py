"""What attention computes, written from its formulas alone: the oracle of the tests.

Plain torch operators that autograd knows, every score in memory. In float64 the truth; in the dtype
of the operands the yardstick, what one writes without pumice. Nothing here is shared with the code
under test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reference import ROUNDING


@dataclass(frozen=True)
class Options:
    """The options of a call on one batch of sequences of one length, positions as a list."""

    softmax_scale: float | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    sink_tokens: int = 0
    global_positions: tuple[tuple[int, ...], ...] = ((),)  # for each of the batch, or one for all
    softcap: float = 0.0


def visible(options: Options, batch: int, queries: int, keys: int, mask: Tensor | None) -> Tensor:
    """Which query sees which key: bool [B, 1 or H, S_q, S_k]."""
    p = torch.arange(queries)[:, None] + keys - queries
    j = torch.arange(keys)[None, :]
    left, right = options.window
    after = torch.ones(queries, keys, dtype=torch.bool) if right < 0 else j <= p + right
    before = torch.ones(queries, keys, dtype=torch.bool) if left < 0 else j >= p - left
    in_window = after & (before | (j < options.sink_tokens))
    seen = torch.empty(batch, 1, queries, keys, dtype=torch.bool)
    for b in range(batch):
        lists = options.global_positions
        positions = torch.tensor(lists[b if len(lists) > 1 else 0], dtype=torch.long)
        seen[b, 0] = in_window | torch.isin(j, positions) | torch.isin(p, positions)
    if options.causal:
        seen = seen & (j <= p)
    return seen if mask is None else seen & mask.expand(batch, mask.shape[1], queries, keys)


def scores(
    query: Tensor, key: Tensor, options: Options, alibi_slopes: Tensor | None = None
) -> Tensor:
    """[B, H, S_q, S_k], hidden keys too; operands [B, S, H, D]."""
    queries, keys, group = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    scale = options.softmax_scale
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = key.repeat_interleave(group, dim=2)
    s = scale * (query.transpose(1, 2) @ heads.permute(0, 2, 3, 1))
    if options.softcap > 0:
        s = options.softcap * torch.tanh(s / options.softcap)
    if alibi_slopes is not None:
        p = torch.arange(queries)[:, None] + keys - queries
        distance = (p - torch.arange(keys)[None, :]).abs()
        s = s - alibi_slopes.to(s.dtype).reshape(-1, s.shape[1], 1, 1) * distance
    return s


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    *,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """out [B, S_q, H, D_v] and lse [B, H, S_q], computed in `dtype`. mask: [B|1, H|1, S_q, S_k]."""
    batch, queries, heads, _ = query.shape
    group = heads // key.shape[2]
    s = scores(query.to(dtype), key.to(dtype), options, alibi_slopes)
    seen = visible(options, batch, queries, key.shape[1], mask).expand_as(s)
    s = torch.where(seen, s, -torch.inf)
    if sinks is not None:
        column = sinks.to(dtype).reshape(1, heads, 1, 1).expand(batch, heads, queries, 1)
        s = torch.cat([s, column], dim=-1)
    # A row of -inf has no softmax. It becomes zeros, whose weights are then taken away.
    empty = (s == -torch.inf).all(-1, keepdim=True)
    s = torch.where(empty, 0.0, s)
    lse = torch.where(empty[..., 0], -torch.inf, torch.logsumexp(s, dim=-1))
    if s.shape[-1] == 0:
        return query.new_zeros((batch, queries, heads, value.shape[-1]), dtype=dtype), lse
    weights = torch.softmax(s, dim=-1)[..., : key.shape[1]]
    weights = torch.where(seen & ~empty, weights, 0.0)
    out = weights @ value.to(dtype).repeat_interleave(group, dim=2).transpose(1, 2)
    return out.transpose(1, 2), lse


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def assert_as_exact_as_plain(
    actual: Tensor, exact: Tensor, plain: Tensor, unit: float, what: str = "out"
) -> None:
    """FlashAttention's rule: at most twice the largest error of plain torch in the same dtype.

    And a few roundings of values of size `unit`, for plain torch can be lucky.
    """
    actual, plain = actual.detach().double().cpu(), plain.detach().double().cpu()
    assert actual.shape == exact.shape
    finite = exact.isfinite()
    assert torch.equal(torch.where(finite, 0.0, exact), torch.where(finite, 0.0, actual)), what
    error = largest(torch.where(finite, actual - exact, 0.0))
    yardstick = largest(torch.where(finite, plain - exact, 0.0))
    assert error <= 2 * yardstick + unit, (
        f"{what}: error {error:.3g}, plain torch {yardstick:.3g}, allowance {unit:.3g}"
    )


def rounding(dtype: torch.dtype) -> float:
    """What one unlucky rounding costs beside a lucky yardstick; float32 has several."""
    return max(ROUNDING[dtype], 8 * ROUNDING[torch.float32])
