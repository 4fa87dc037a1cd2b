"""Inputs of the paged attention tests: sequences scattered over a pool, amid poison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import attention_reference
import paged_reference
import pumice
from attention_cases import offsets, to_device
from backends import Backend
from cases import FLOATS
from pairwise import pairwise

# Options by the names of the call's arguments; "tree" makes a tree mask.
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": (20, 0)},
    "window ahead": {"causal": False, "window": (9, 2)},
    "narrow window": {"window": (0, 0)},
    "streaming": {"window": (9, -1), "sink_tokens": 4},
    "tree": {"tree": True},
    "tree window": {"tree": True, "window": (25, -1), "sink_tokens": 2},
    "tree full": {"tree": True, "causal": False},
}

# Queries and keys of each sequence of a batch.
LENGTHS: dict[str, list[tuple[int, int]]] = {
    "decode": [(1, 70), (1, 1), (1, 129), (1, 16)],
    "zero": [(1, 0), (1, 40), (0, 7), (3, 0)],
    "chunk": [(17, 100), (40, 40)],
    "mixed": [(1, 200), (33, 65), (0, 20), (5, 5), (1, 64), (4, 2)],
    "verify": [(5, 77), (5, 132), (8, 8)],
    "wide": [(70, 150)],
}


@dataclass(frozen=True)
class PagedCase:
    """Shape, dtypes and mask of one call."""

    lengths: tuple[tuple[int, int], ...] = ((1, 70), (17, 100))
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    value_dim: int = 16
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # None: dtype
    scales: str = "tensor"  # "head"; of a cache of bytes
    mask: str = "causal"
    packed: bool = True
    layout: str = "contiguous"  # "together": both caches in one tensor, block by block
    softcap: float = 0.0
    sinks: bool = False
    alibi: str | None = None  # "H", "BH"
    seed: int = 0

    @property
    def stored(self) -> torch.dtype:
        return self.cache_dtype or self.dtype


@dataclass(frozen=True)
class Inputs:
    """A case's tensors on the CPU."""

    case: PagedCase
    queries: list[Tensor]
    cache: paged_reference.Cache
    table: Tensor  # int32 [B, max_blocks], what is never to be read -1 or worse
    options: attention_reference.Options
    trees: list[Tensor] | None
    keywords: dict[str, Any] = field(default_factory=dict)

    def exact(self, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
        results = []
        for b, query in enumerate(self.queries):
            slopes = self.keywords.get("alibi_slopes")
            results.append(
                paged_reference.attention(
                    query,
                    self.cache,
                    self.table[b].tolist(),
                    self.case.lengths[b][1],
                    self.options,
                    sinks=self.keywords.get("sinks"),
                    alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
                    tree=None if self.trees is None else self.trees[b],
                    dtype=dtype,
                )
            )
        return results


def _tree(queries: int, g: torch.Generator) -> Tensor:
    """Each query sees itself and its ancestors; bool [S_q, S_q]."""
    mask = torch.eye(queries, dtype=torch.bool)
    for i in range(1, queries):
        mask[i] |= mask[int(torch.randint(0, i, (1,), generator=g))]
    return mask


def _stored(x: Tensor, dtype: torch.dtype, heads: int, kind: str) -> tuple[Tensor, Tensor | None]:
    """Random numbers as a cache keeps them, and their scale."""
    if dtype not in (torch.float8_e4m3fn, torch.int8):
        return x.to(dtype), None
    largest = 448.0 if dtype == torch.float8_e4m3fn else 127.0
    scale = (
        x.abs().amax(dim=(0, 1, 3)) / largest if kind == "head" else x.abs().max()[None] / largest
    )
    steps = x / (scale[:, None] if kind == "head" else scale)
    return (steps.to(dtype) if largest > 200 else steps.round().to(dtype)), scale


def inputs(case: PagedCase) -> Inputs:
    g = torch.Generator().manual_seed(case.seed)
    size, lengths = case.block_size, case.lengths
    needed = [-(-keys // size) for _, keys in lengths]
    columns, pool = max([1, *needed]) + 2, sum(needed) + 5
    options = dict(MASKS[case.mask])
    tree = options.pop("tree", False)
    order = torch.randperm(pool, generator=g).tolist()
    table = torch.tensor([-1, -(2**31), 2**31 - 1, pool, 12345678], dtype=torch.int32)
    table = table[torch.randint(0, 5, (len(lengths), columns), generator=g)]
    key = torch.randn(pool, size, case.kv_heads, case.dim, generator=g)
    value = torch.randn(pool, size, case.kv_heads, case.value_dim, generator=g)
    (key, k_scale), (value, v_scale) = (
        _stored(x, case.stored, case.kv_heads, case.scales) for x in (key, value)
    )
    reference_options = attention_reference.Options(
        causal=options.get("causal", True),
        window=options.get("window", (-1, -1)),
        sink_tokens=options.get("sink_tokens", 0),
        softcap=case.softcap,
    )
    used = torch.zeros(pool, size, dtype=torch.bool)
    trees = [_tree(queries, g) for queries, _ in lengths] if tree else None
    for b, (queries, keys) in enumerate(lengths):
        seen = attention_reference.visible(reference_options, 1, queries, keys, None)[0, 0].any(0)
        for n in range(needed[b]):
            block, slots = order.pop(), seen[n * size : (n + 1) * size]
            # A block that nobody sees was given back: another sequence may have filled it.
            table[b, n] = block if slots.any() else -1
            if slots.any():
                used[block, : len(slots)] |= slots
    poison(key, value, ~used)
    queries_of = [torch.randn(q, case.heads, case.dim, generator=g).to(case.dtype)
                  for q, _ in lengths]  # fmt: skip
    slopes = None
    if case.alibi is not None:
        shape = (case.heads,) if case.alibi == "H" else (len(lengths), case.heads)
        slopes = torch.rand(shape, generator=g) * 0.1
    keywords = options | {
        "softcap": case.softcap,
        "sinks": torch.randn(case.heads, generator=g) * 2 if case.sinks else None,
        "alibi_slopes": slopes,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    cache = paged_reference.Cache(key, value, k_scale, v_scale)
    return Inputs(case, queries_of, cache, table, reference_options, trees, keywords)


def poison(key: Tensor, value: Tensor, where: Tensor) -> None:
    """NaN in the slots where bool [num_blocks, block_size]; the largest byte in a cache of int8."""
    for cache in (key, value):
        if cache.dtype == torch.int8:
            cache[where] = 127
        elif cache.dtype == torch.float8_e4m3fn:
            cache.view(torch.uint8)[where] = 0x7F
        else:
            cache[where] = torch.nan


def caches(given: Inputs, device: str) -> tuple[Tensor, Tensor]:
    """The pair on a device, laid out as the case says."""
    key, value = given.cache.key.to(device), given.cache.value.to(device)
    if given.case.layout == "contiguous" or key.shape != value.shape:
        return key, value
    together = torch.stack([key.view(torch.uint8) if key.element_size() == 1 else key,
                            value.view(torch.uint8) if key.element_size() == 1 else value],
                           dim=1)  # fmt: skip
    return together[:, 0].view(key.dtype), together[:, 1].view(key.dtype)


def packed_tree(given: Inputs) -> Tensor | None:
    """bool [total, longest], whatever lies beyond a sequence's own queries set."""
    if given.trees is None:
        return None
    longest = max(q for q, _ in given.case.lengths)
    rows = torch.ones(sum(q for q, _ in given.case.lengths), longest, dtype=torch.bool)
    first = 0
    for tree in given.trees:
        rows[first : first + len(tree), : len(tree)] = tree
        first += len(tree)
    return rows


def run(backend: Backend, given: Inputs, **changed: Any) -> list[tuple[Tensor, Tensor]]:
    """out and lse of each sequence, on the CPU."""
    case = given.case
    keywords = {k: to_device(v, backend.device) for k, v in (given.keywords | changed).items()}
    tree = packed_tree(given)
    if tree is not None and "tree_mask" not in changed:
        keywords["tree_mask"] = tree.to(backend.device)
    lengths = [q for q, _ in case.lengths]
    seq_lens = torch.tensor([k for _, k in case.lengths], dtype=torch.int32, device=backend.device)
    rest = (*caches(given, backend.device), given.table.to(backend.device), seq_lens)
    if not case.packed:
        query = torch.stack(given.queries).to(backend.device)
        out, lse = pumice.ops.paged_attention(query, *rest, **keywords, return_lse=True)
        assert out.shape == (len(lengths), lengths[0], case.heads, case.value_dim)
        assert lse.shape == (len(lengths), case.heads, lengths[0])
        results = list(zip(out.cpu(), lse.cpu(), strict=True))
    else:
        query = torch.cat(given.queries).to(backend.device)
        out, lse = pumice.ops.paged_attention(
            query, *rest, cu_seqlens_q=offsets(lengths).to(backend.device),
            max_seqlen_q=max(lengths), **keywords, return_lse=True,
        )  # fmt: skip
        assert out.shape == (sum(lengths), case.heads, case.value_dim)
        assert lse.shape == (case.heads, sum(lengths))
        results = list(zip(out.cpu().split(lengths), lse.cpu().split(lengths, dim=1), strict=True))
    assert (out.dtype, lse.dtype) == (case.dtype, torch.float32)
    assert out.is_contiguous()
    return results


def check(backend: Backend, case: PagedCase) -> list[tuple[Tensor, Tensor]]:
    """A case against float64, by FlashAttention's rule."""
    given = inputs(case)
    results = run(backend, given)
    exact, plain = given.exact(), given.exact(case.dtype)
    for (out, lse), (exact_out, exact_lse), (plain_out, _) in zip(
        results, exact, plain, strict=True
    ):
        unit = attention_reference.rounding(case.dtype)
        unit *= max(1.0, attention_reference.largest(exact_out))
        attention_reference.assert_as_exact_as_plain(out, exact_out, plain_out, unit)
        lse_unit = 16 * 2.0**-24 * 64 * max(1.0, case.dim**0.5)
        attention_reference.assert_as_exact_as_plain(lse, exact_lse, exact_lse, lse_unit, "lse")
    return results


AXES: dict[str, Sequence[Any]] = {
    "dtype": FLOATS,
    "cache_dtype": (None, torch.float8_e4m3fn, torch.int8),
    "scales": ("tensor", "head"),
    "block_size": (1, 3, 16, 64, 100),
    "dims": ((16, 16), (64, 64), (128, 128), (33, 17), (96, 40), (1, 5)),
    "heads": ((1, 1), (3, 3), (4, 2), (16, 1)),
    "lengths": tuple(LENGTHS),
    "mask": tuple(MASKS),
    "layout": ("contiguous", "together"),
    "softcap": (0.0, 3.0),
    "sinks": (False, True),
    "alibi": (None, "H", "BH"),
}


def of_axes(row: dict[str, Any], seed: int) -> PagedCase:
    row = dict(row)
    (dim, value_dim), (heads, kv_heads) = row.pop("dims"), row.pop("heads")
    lengths = tuple(LENGTHS[row.pop("lengths")])
    return PagedCase(dim=dim, value_dim=value_dim, heads=heads, kv_heads=kv_heads, seed=seed,
                     lengths=lengths, packed=len({q for q, _ in lengths}) > 1, **row)  # fmt: skip


PAIRS = [of_axes(row, seed) for seed, row in enumerate(pairwise(AXES))]


def fitted(backend: Backend, case: PagedCase) -> PagedCase:
    """The case as a backend can run it, and in a bearable time."""
    if backend.name != "cpu" and case.dtype != torch.float32:  # rows on boundaries of 16 bytes
        piece = 16 // case.stored.itemsize
        dim, value_dim = (-(-x // piece) * piece for x in (case.dim, case.value_dim))
        case = replace(case, dim=dim, value_dim=value_dim)
    if backend.name != "emulated":
        return case
    return replace(case, lengths=case.lengths[:3], heads=min(case.heads, 4 * case.kv_heads))
