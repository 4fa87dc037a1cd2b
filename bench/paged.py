"""Decoding over a paged cache: ``python -m bench paged``.

Beside pumice's attention to the same keys in one piece (what paging costs), and gathering the keys
before torch's ``scaled_dot_product_attention`` (what one writes without a paged kernel). Floor:
keys and values moved once over the memory bandwidth; for one query each the products are nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from bench.cases import BASELINE, Bench, Peer, UnavailableError
from bench.machine import Machine
from bench.timing import Contender, copies_beyond_cache


@dataclass(frozen=True)
class Paged:
    """B sequences of S_k keys and S_q queries, H heads on H_kv of key and value."""

    batch: int
    heads: int
    kv_heads: int
    keys: int
    dim: int
    block_size: int = 16
    queries: int = 1
    stored: str = ""  # "fp8" or "int8"; else the dtype of the query

    def __str__(self) -> str:
        lengths = f"S={self.queries}/{self.keys}"
        heads = f"H={self.heads}/{self.kv_heads}"
        page = f"page {self.block_size}" + (f" {self.stored}" if self.stored else "")
        return f"B={self.batch} {heads} {lengths} D={self.dim} {page}"

    @property
    def operations(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys * self.dim


@dataclass
class Inputs:
    """Rotated copies of a query and its cache; keys in one piece are made by the peers."""

    case: Paged
    queries: list[torch.Tensor]  # [B, S_q, H, D]
    caches: list[tuple[torch.Tensor, torch.Tensor]]  # [num_blocks, block_size, H_kv, D] each
    table: torch.Tensor  # [B, S_k / block_size], blocks in no order
    lengths: torch.Tensor
    scale: torch.Tensor | None

    def contiguous(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self.scale is not None:
            raise UnavailableError("floats only")
        rows = self.table.long()
        return [(k[rows].flatten(1, 2), v[rows].flatten(1, 2)) for k, v in self.caches]


def stored_dtype(case: Paged, dtype: torch.dtype) -> torch.dtype:
    return {"fp8": torch.float8_e4m3fn, "int8": torch.int8}.get(case.stored, dtype)


def moved_bytes(case: Paged, dtype: torch.dtype) -> int:
    per_token = case.kv_heads * case.dim * stored_dtype(case, dtype).itemsize
    return 2 * case.batch * case.keys * per_token


def make_inputs(case: Paged, machine: Machine, device: torch.device, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)
    columns = -(-case.keys // case.block_size)
    blocks = case.batch * columns
    copies = min(copies_beyond_cache(moved_bytes(case, dtype), machine.cache_bytes), 16)
    kept = stored_dtype(case, dtype)

    def cache() -> torch.Tensor:
        x = torch.randn(blocks, case.block_size, case.kv_heads, case.dim, generator=g)
        return (x if kept.is_floating_point else (x * 40).round().clamp(-127, 127)).to(device, kept)

    query = (case.batch, case.queries, case.heads, case.dim)
    return Inputs(
        case,
        [torch.randn(query, generator=g).to(device, dtype) for _ in range(copies)],
        [(cache(), cache()) for _ in range(copies)],
        torch.randperm(blocks, generator=g).view(case.batch, columns).int().to(device),
        torch.full((case.batch,), case.keys, dtype=torch.int32, device=device),
        torch.ones(1, device=device) if kept.itemsize == 1 else None,
    )


def gather_and_sdpa(inputs: Inputs) -> Contender:
    """The keys that the table names, in the dtype of the query, then torch's attention."""
    case, table = inputs.case, inputs.table.long()
    group = case.heads // case.kv_heads

    def call(i: int) -> object:
        i %= len(inputs.queries)
        query = inputs.queries[i]
        key, value = (
            cache[table].flatten(1, 2)[:, : case.keys].to(query.dtype).transpose(1, 2)
            for cache in inputs.caches[i]
        )
        return functional.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, enable_gqa=group > 1
        ).transpose(1, 2)

    return call


def pumice_contiguous(inputs: Inputs) -> Contender:
    from pumice.ops import flash_attention

    whole = inputs.contiguous()

    def call(i: int) -> object:
        i %= len(whole)
        key, value = (x[:, : inputs.case.keys] for x in whole[i])
        return flash_attention(inputs.queries[i], key, value, causal=True)

    return call


def pumice_paged(inputs: Inputs) -> Contender:
    from pumice.ops import paged_attention

    def call(i: int) -> object:
        i %= len(inputs.queries)
        return paged_attention(
            inputs.queries[i],
            *inputs.caches[i],
            inputs.table,
            inputs.lengths,
            k_scale=inputs.scale,
            v_scale=inputs.scale,
        )

    return call


PEERS: dict[str, Peer[Inputs]] = {
    BASELINE: gather_and_sdpa,
    "pumice contiguous": pumice_contiguous,
    "pumice": pumice_paged,
}


def floor_us(case: Paged, machine: Machine, dtype: torch.dtype) -> float:
    return moved_bytes(case, dtype) / machine.bandwidth * 1e6


BENCH = Bench(
    "paged",
    make_inputs,
    PEERS,
    floor_us,
    kernel_names=("paged_", "flash_", "attention_", "merge_attention"),
)


def cpu_cases() -> list[Paged]:
    decode = [Paged(8, heads, 8, 4096, 128) for heads in (8, 32)]
    pages = [Paged(8, 8, 8, 4096, 128, block_size=size) for size in (1, 64)]
    kept = [Paged(8, 32, 8, 4096, 128, stored=stored) for stored in ("fp8", "int8")]
    return [*decode, *pages, *kept]


def cuda_cases() -> list[Paged]:
    decode = [
        Paged(batch, 32, 8, keys, 128)
        for batch, keys in ((1, 1024), (1, 4096), (16, 4096), (64, 4096), (16, 16384))
    ]
    pages = [Paged(64, 32, 8, 4096, 128, block_size=size) for size in (1, 64)]
    kept = [Paged(64, 32, 8, 4096, 128, stored=stored) for stored in ("fp8", "int8")]
    return [*decode, *pages, *kept]


CASES = {"cpu": cpu_cases, "cuda": cuda_cases}
