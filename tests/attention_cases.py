"""Inputs of the attention tests: shapes, masks and layouts, and their run on a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import attention_reference as reference
import pumice
from backends import Backend
from cases import FLOATS
from pairwise import pairwise

# Kinds of masks: options of the call, by the names of its arguments. "bits" makes a boolean mask.
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (5, 3)},
    "diagonal": {"window": (0, 0)},
    "left": {"window": (70, -1)},
    "right": {"window": (-1, 9)},
    "causal window": {"causal": True, "window": (16, 0)},
    "streaming": {"causal": True, "window": (9, -1), "sink_tokens": 4},
    "sink tokens": {"window": (3, 2), "sink_tokens": 70},
    "global": {"window": (4, 4), "global_tokens": 2},
    "global list": {"window": (6, 6), "global_tokens": (31, 3, 64, 3, 150)},
    "global tensor": {"window": (6, 2), "global_tokens": "each"},
    "causal global": {"causal": True, "window": (8, -1), "global_tokens": (1, 40)},
    "bits": {"bits": "matrix"},
    "padding bits": {"bits": "padding"},
    "bits of heads": {"bits": "heads"},
    "block bits": {"bits": "blocks"},
    "tree": {"bits": "tree"},
    "bits causal window": {"bits": "matrix", "causal": True, "window": (40, -1), "sink_tokens": 1},
}


@dataclass(frozen=True)
class AttentionCase:
    """Shape, dtype, mask and layout of one call."""

    batch: int = 2
    queries: int = 17
    keys: int = 70
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    mask: str = "full"
    packed: bool = False  # the sequences of different lengths, in one row
    layout: str = "contiguous"  # "transposed", "sliced", "expanded"
    softmax_scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    alibi: str | None = None  # "H", "BH"
    seed: int = 0

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Queries and keys of each sequence."""
        if not self.packed:
            return [(self.queries, self.keys)] * self.batch
        shorter = [(self.queries, self.keys), (0, self.keys // 2), (self.queries // 2, self.keys),
                   (self.queries, 0), (1, self.keys // 3)]  # fmt: skip
        return [shorter[b % len(shorter)] for b in range(self.batch)]


@dataclass(frozen=True)
class Inputs:
    """Operands of a case on the CPU, dense, and what a call is given beside them."""

    case: AttentionCase
    sequences: list[tuple[Tensor, Tensor, Tensor]]  # [S, H, D] each
    options: list[reference.Options]  # of each sequence
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    mask: Tensor | None  # [B|1, H|1, S_q, S_k]
    keywords: dict[str, Any] = field(default_factory=dict)  # of the call, tensors on the CPU

    def exact(self, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
        """out [S_q, H, D_v] and lse [H, S_q] of each sequence, in dtype."""
        results = []
        for b, (query, key, value) in enumerate(self.sequences):
            slopes, mask = self.alibi_slopes, self.mask
            if slopes is not None and slopes.dim() == 2:
                slopes = slopes[b]
            if mask is not None and mask.shape[0] > 1:
                mask = mask[b : b + 1]
            out, lse = reference.attention(
                query[None], key[None], value[None], self.options[b],
                sinks=self.sinks, alibi_slopes=slopes, mask=mask, dtype=dtype,
            )  # fmt: skip
            results.append((out[0], lse[0]))
        return results

    def lse_unit(self) -> float:
        """What roundings of the scores' terms may cost the lse: Σ_d |q|·|k| says how large."""
        size = 1.0
        for query, key, _ in self.sequences:
            if query.numel() and key.numel():
                scale = abs(self.options[0].softmax_scale or self.case.dim**-0.5)
                rows = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max()
                size = max(size, scale * float(rows))
        if self.alibi_slopes is not None:
            size += float(self.alibi_slopes.max()) * max(self.case.queries, self.case.keys)
        return 16 * 2.0**-24 * size


def boolean_mask(case: AttentionCase, kind: str, g: torch.Generator) -> Tensor:
    batch, heads, queries, keys = case.batch, case.heads, case.queries, case.keys
    if kind == "padding":
        lengths = torch.randint(0, keys + 1, (batch, 1, 1, 1), generator=g)
        return (torch.arange(keys) < lengths).expand(batch, 1, queries, keys)
    if kind == "heads":
        return torch.rand(batch, heads, queries, keys, generator=g) < 0.5
    if kind == "blocks":  # whole squares that show all, none or some
        shape = (1, heads, -(-queries // 64), -(-keys // 64))
        chosen = torch.randint(0, 3, shape, generator=g)
        chosen = chosen.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :queries, :keys]
        return (chosen == 2) | ((chosen == 1) & (torch.rand(chosen.shape, generator=g) < 0.5))
    if kind == "tree":  # each query sees a prefix, and its ancestors among the last keys
        prefix = max(0, keys - queries)
        mask = torch.zeros(queries, keys, dtype=torch.bool)
        mask[:, :prefix] = True
        for i in range(min(queries, keys)):
            ancestor = i
            while True:
                mask[i, prefix + ancestor] = True
                if ancestor == 0:
                    break
                ancestor = int(torch.randint(0, ancestor, (1,), generator=g))
        return mask[None, None]
    return (torch.rand(queries, keys, generator=g) < 0.3)[None, None]


def inputs(case: AttentionCase) -> Inputs:
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(case.dtype)

    sequences = [
        (normal(q, case.heads, case.dim), normal(k, case.kv_heads, case.dim),
         normal(k, case.kv_heads, case.value_dim))
        for q, k in case.lengths
    ]  # fmt: skip
    keywords = dict(MASKS[case.mask])
    bits = keywords.pop("bits", None)
    mask = None if bits is None else boolean_mask(case, bits, g)
    positions: tuple[tuple[int, ...], ...] = ((),)
    chosen = keywords.get("global_tokens", 0)
    if chosen == "each":
        listed = torch.randint(-1, case.keys + 3, (case.batch, 4), generator=g)
        keywords["global_tokens"] = listed
        positions = tuple(tuple(p for p in row if p >= 0) for row in listed.tolist())
    elif isinstance(chosen, tuple):
        positions = (chosen,)
    else:
        positions = (tuple(range(chosen)),)
    slopes = None
    if case.alibi is not None:
        shape = (case.heads,) if case.alibi == "H" else (case.batch, case.heads)
        slopes = torch.rand(*shape, generator=g) * 0.1
    sinks = torch.randn(case.heads, generator=g) * 2 if case.sinks else None
    options = [
        reference.Options(
            softmax_scale=case.softmax_scale,
            causal=keywords.get("causal", False),
            window=keywords.get("window", (-1, -1)),
            sink_tokens=keywords.get("sink_tokens", 0),
            global_positions=(positions[b if len(positions) > 1 else 0],) if positions else ((),),
            softcap=case.softcap,
        )
        for b in range(case.batch)
    ]
    keywords |= {"softmax_scale": case.softmax_scale, "softcap": case.softcap, "sinks": sinks,
                 "alibi_slopes": slopes}  # fmt: skip
    if mask is not None:
        keywords["mask"] = mask
    return Inputs(case, sequences, options, sinks, slopes, mask, keywords)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides; x is [B, S, H, D] or [total, H, D]."""
    if layout == "transposed":  # heads before tokens in memory, as torch's own attention has them
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":  # a part of a fused projection, amid poison
        wide = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 3), torch.nan)
        inside = wide.to(x)[..., 1:-1, 1:-2]
        inside.copy_(x)
        return inside
    if layout == "unaligned":  # the last dimension strided: refused by no one, copied by the op
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    return x


def to_device(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def offsets(lengths: Sequence[int], start: int = 0) -> Tensor:
    return torch.tensor([start, *lengths]).cumsum(0).int()


def run(
    backend: Backend, given: Inputs, *, poison: int = 0, **changed: Any
) -> list[tuple[Tensor, Tensor]]:
    """out and lse of each sequence, on the CPU; packed amid so many rows of NaN."""
    case = given.case
    keywords = {k: to_device(v, backend.device) for k, v in (given.keywords | changed).items()}
    if not case.packed:
        if case.batch == 0:
            dense = [torch.zeros(0, case.queries, case.heads, case.dim, dtype=case.dtype),
                     torch.zeros(0, case.keys, case.kv_heads, case.dim, dtype=case.dtype),
                     torch.zeros(0, case.keys, case.kv_heads, case.value_dim,
                                 dtype=case.dtype)]  # fmt: skip
        else:
            dense = [torch.stack(tensors) for tensors in zip(*given.sequences, strict=True)]
        operands = [laid_out(x.to(backend.device), case.layout) for x in dense]
        out, lse = pumice.ops.flash_attention(*operands, **keywords, return_lse=True)
        assert out.shape == (case.batch, case.queries, case.heads, case.value_dim)
        assert lse.shape == (case.batch, case.heads, case.queries)
        assert (out.dtype, lse.dtype) == (case.dtype, torch.float32)
        assert out.is_contiguous()
        return [(o.cpu(), s.cpu()) for o, s in zip(out, lse, strict=True)]
    operands = []
    for tensors, heads, dim in zip(
        zip(*given.sequences, strict=True) if case.batch else ((), (), ()),
        (case.heads, case.kv_heads, case.kv_heads),
        (case.dim, case.dim, case.value_dim),
        strict=True,
    ):
        around = torch.full((poison, heads, dim), torch.nan, dtype=case.dtype)
        row = torch.cat([around, *tensors, around])
        operands.append(laid_out(row.to(backend.device), case.layout))
    q_lengths, k_lengths = [q for q, _ in case.lengths], [k for _, k in case.lengths]
    out, lse = pumice.ops.flash_attention_varlen(
        *operands,
        offsets(q_lengths, poison).to(backend.device),
        offsets(k_lengths, poison).to(backend.device),
        max_seqlen_q=max(q_lengths, default=0),
        max_seqlen_k=max(k_lengths, default=0),
        **keywords,
        return_lse=True,
    )
    assert out.shape == (sum(q_lengths) + 2 * poison, case.heads, case.value_dim)
    assert lse.shape == (case.heads, sum(q_lengths) + 2 * poison)
    assert (out.dtype, lse.dtype) == (case.dtype, torch.float32)
    assert out.is_contiguous()
    outside = [*range(poison), *range(len(out) - poison, len(out))]
    assert not out[outside].any()
    assert (lse[:, outside] == -torch.inf).all()
    inside = slice(poison, len(out) - poison)
    outs, lses = out[inside].cpu().split(q_lengths), lse[:, inside].cpu().split(q_lengths, dim=1)
    return list(zip(outs, lses, strict=True))


def check(backend: Backend, case: AttentionCase, **changed: Any) -> list[tuple[Tensor, Tensor]]:
    """A case against float64, by FlashAttention's rule."""
    given = inputs(case)
    results = run(backend, given, **changed)
    exact, plain = given.exact(), given.exact(case.dtype)
    for (out, lse), (exact_out, exact_lse), (plain_out, _) in zip(
        results, exact, plain, strict=True
    ):
        unit = reference.rounding(case.dtype) * max(1.0, reference.largest(exact_out))
        reference.assert_as_exact_as_plain(out, exact_out, plain_out, unit)
        reference.assert_as_exact_as_plain(lse, exact_lse, exact_lse, given.lse_unit(), "lse")
    return results


# Lengths around the edges of words, squares of the mask and tiles, one query, fewer keys than
# queries, none of either.
LENGTHS = ((1, 1), (1, 130), (7, 65), (63, 64), (64, 63), (65, 129), (129, 127), (130, 257),
           (200, 33), (3, 0), (0, 5))  # fmt: skip

AXES: dict[str, Sequence[Any]] = {
    "dtype": FLOATS,
    "dims": (
        (16, 16),
        (64, 64),
        (128, 128),
        (72, 72),
        (96, 40),
        (33, 17),
        (192, 128),
        (256, 256),
        (1, 5),
        (24, 64),
    ),
    "heads": ((1, 1), (3, 3), (4, 2), (6, 1)),
    "lengths": LENGTHS,
    "batch": (1, 2, 6),
    "mask": tuple(MASKS),
    "packed": (False, False, True),
    "layout": ("contiguous", "transposed", "sliced", "unaligned"),
    "softmax_scale": (None, 0.2),
    "softcap": (0.0, 0.0, 3.0),
    "sinks": (False, True),
    "alibi": (None, "H", "BH"),
}


def of_axes(row: dict[str, Any], seed: int) -> AttentionCase:
    row = dict(row)
    (dim, value_dim), (heads, kv_heads) = row.pop("dims"), row.pop("heads")
    queries, keys = row.pop("lengths")
    if "bits" in MASKS[row["mask"]]:
        row["packed"] = False  # boolean masks are of one shape for all sequences
    return AttentionCase(dim=dim, value_dim=value_dim, heads=heads, kv_heads=kv_heads,
                         queries=queries, keys=keys, seed=seed, **row)  # fmt: skip


PAIRS = [of_axes(row, seed) for seed, row in enumerate(pairwise(AXES))]


def fitted(backend: Backend, case: AttentionCase) -> AttentionCase:
    """The case as a backend can run it, and in a bearable time."""
    if backend.name != "emulated":
        return case
    return replace(
        case,
        batch=min(case.batch, 2),
        heads=min(case.heads, 2 * case.kv_heads, 2) if case.kv_heads == 1 else case.kv_heads,
        queries=min(case.queries, 70),
        keys=min(case.keys, 130),
    )
