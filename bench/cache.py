"""What surrounds attention to a cache: ``python -m bench cache``.

Writing tokens into a paged cache, copying its blocks, merging partial results and packing a mask,
each beside the plain torch that one writes without an operator for it. Floor: what goes in read
once and what comes out written once, over the memory bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import BASELINE, Bench, Peer
from bench.machine import Machine
from bench.timing import Contender, copies_beyond_cache

ROTATED_BYTES = 1 << 28  # of all copies of an input, or 16 of them
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@dataclass(frozen=True)
class Calls:
    """One case as torch and as pumice do it; both return what they made or changed."""

    plain: Callable[[int], list[Tensor]]
    pumice: Callable[[int], list[Tensor]]


def rotated(moved: int, machine: Machine) -> int:
    """How many copies of inputs of so many bytes."""
    return min(copies_beyond_cache(moved, machine.cache_bytes), max(16, ROTATED_BYTES // moved))


@dataclass(frozen=True)
class Append:
    """T tokens of H_kv heads into slots in no order, rotated and quantized on the way or not."""

    tokens: int
    kv_heads: int = 8
    dim: int = 128
    block_size: int = 16
    stored: str = ""  # "fp8" or "int8"; else the dtype of the keys
    rotary: bool = False
    operations: int = 0

    def __str__(self) -> str:
        extra = (" rotary" if self.rotary else "") + (f" {self.stored}" if self.stored else "")
        return f"append T={self.tokens} H={self.kv_heads} D={self.dim}{extra}"

    def kept(self, dtype: torch.dtype) -> torch.dtype:
        return {"fp8": torch.float8_e4m3fn, "int8": torch.int8}.get(self.stored, dtype)

    def moved(self, dtype: torch.dtype) -> int:
        vectors = 2 * self.tokens * self.kv_heads * self.dim
        angles = self.tokens * self.dim * 4 if self.rotary else 0
        return vectors * (dtype.itemsize + self.kept(dtype).itemsize) + angles + 8 * self.tokens

    def make(self, copies: int, device: torch.device, dtype: torch.dtype) -> Calls:
        from pumice.ops import cache_append

        g = torch.Generator().manual_seed(0)
        blocks = -(-copies * self.tokens // self.block_size)
        kept = self.kept(dtype)
        pool = (blocks, self.block_size, self.kv_heads, self.dim)
        caches = [torch.zeros(pool, device=device).to(kept) for _ in range(2)]
        # Slots as bytes: torch does not write float8 by an index.
        flat = [x.view(torch.uint8 if kept in LARGEST else kept).flatten(0, 1) for x in caches]
        slots = torch.randperm(blocks * self.block_size, generator=g)[: copies * self.tokens]
        slots = slots.view(copies, self.tokens).to(device)
        vectors = (copies, self.tokens, self.kv_heads, self.dim)
        keys, values = (torch.randn(vectors, generator=g).to(device, dtype) for _ in range(2))
        positions = torch.randint(0, 8192, (self.tokens,), generator=g).to(device)
        angles = torch.outer(torch.arange(8192.0), 1e4 ** -torch.linspace(0, 1, self.dim // 2))
        cos, sin = angles.cos().to(device), angles.sin().to(device)
        scale = torch.full((1,), 0.05, device=device) if kept in LARGEST else None

        def rotate(key: Tensor) -> Tensor:
            c, s = cos[positions][:, None], sin[positions][:, None]
            a, b = key.float().chunk(2, dim=-1)
            return torch.cat([a * c - b * s, b * c + a * s], dim=-1)

        def store(x: Tensor) -> Tensor:
            if scale is None:
                return x.to(dtype)
            x = (x.float() / scale).clamp(-LARGEST[kept], LARGEST[kept])
            return (x.round() if kept == torch.int8 else x).to(kept).view(torch.uint8)

        def plain(i: int) -> list[Tensor]:
            i %= copies
            flat[0][slots[i]] = store(rotate(keys[i]) if self.rotary else keys[i])
            flat[1][slots[i]] = store(values[i])
            return flat

        rotary = (cos, sin, positions) if self.rotary else None

        def pumice(i: int) -> list[Tensor]:
            i %= copies
            cache_append(keys[i], values[i], caches[0], caches[1], slots[i], k_scale=scale,
                         v_scale=scale, rotary=rotary)  # fmt: skip
            return flat

        return Calls(plain, pumice)


@dataclass(frozen=True)
class CopyBlocks:
    """Whole blocks of both caches, as a fork of sequences needs them."""

    pairs: int
    block_size: int = 16
    kv_heads: int = 8
    dim: int = 128
    operations: int = 0

    def __str__(self) -> str:
        return f"copy {self.pairs} blocks of {self.block_size} H={self.kv_heads} D={self.dim}"

    def moved(self, dtype: torch.dtype) -> int:
        return 4 * self.pairs * self.block_size * self.kv_heads * self.dim * dtype.itemsize

    def make(self, copies: int, device: torch.device, dtype: torch.dtype) -> Calls:
        from pumice.ops import cache_copy_blocks

        g = torch.Generator().manual_seed(0)
        blocks = 2 * copies * self.pairs
        pool = (blocks, self.block_size, self.kv_heads, self.dim)
        caches = [torch.randn(pool, generator=g).to(device, dtype) for _ in range(2)]
        pairs = torch.randperm(blocks, generator=g).view(copies, self.pairs, 2).to(device)

        def plain(i: int) -> list[Tensor]:
            source, destination = pairs[i % copies].unbind(1)
            for cache in caches:
                cache[destination] = cache[source]
            return caches

        def pumice(i: int) -> list[Tensor]:
            cache_copy_blocks(caches[0], caches[1], pairs[i % copies])
            return caches

        return Calls(plain, pumice)


@dataclass(frozen=True)
class Merge:
    """P partial results of T tokens, by their log-sum-exp."""

    parts: int
    tokens: int
    heads: int = 32
    dim: int = 128
    operations: int = 0

    def __str__(self) -> str:
        return f"merge P={self.parts} T={self.tokens} H={self.heads} D={self.dim}"

    def moved(self, dtype: torch.dtype) -> int:
        rows = (self.parts + 1) * self.tokens * self.heads
        return rows * (self.dim * dtype.itemsize + 4)

    def make(self, copies: int, device: torch.device, dtype: torch.dtype) -> Calls:
        from pumice.ops import merge_attention

        g = torch.Generator().manual_seed(0)
        outs = (copies, self.parts, 1, self.tokens, self.heads, self.dim)
        lses = (copies, self.parts, 1, self.heads, self.tokens)
        out = torch.randn(outs, generator=g).to(device, dtype)
        lse = torch.randn(lses, generator=g).to(device)

        def plain(i: int) -> list[Tensor]:
            i %= copies
            weights = lse[i].softmax(0).transpose(-1, -2)[..., None]
            return [(out[i].float() * weights).sum(0).to(dtype), lse[i].logsumexp(0)]

        def pumice(i: int) -> list[Tensor]:
            i %= copies
            return list(merge_attention(out[i], lse[i]))

        return Calls(plain, pumice)


@dataclass(frozen=True)
class MaskPack:
    """A boolean mask [1, H, S, S] to bits, and to what squares of 64 hold."""

    heads: int
    length: int
    operations: int = 0

    def __str__(self) -> str:
        return f"mask H={self.heads} S={self.length}"

    def moved(self, dtype: torch.dtype) -> int:
        size = self.heads * self.length**2
        return size + size // 8 + size // 64**2

    def make(self, copies: int, device: torch.device, dtype: torch.dtype) -> Calls:
        from pumice.ops import pack_attention_mask

        g = torch.Generator().manual_seed(0)
        shape = (copies, 1, self.heads, self.length, self.length)
        mask = torch.zeros(shape, dtype=torch.bool)
        for copy in mask:
            copy |= torch.rand(copy.shape, generator=g) < 0.5
            copy[..., : self.length // 2, self.length // 2 :] = False
        mask = mask.to(device)
        bit = torch.arange(32, dtype=torch.int32, device=device)

        def plain(i: int) -> list[Tensor]:
            one = mask[i % copies]
            bits = (one.unflatten(-1, (-1, 32)) * (1 << bit)).sum(-1, dtype=torch.int32)
            squares = one.unflatten(-1, (-1, 64)).unflatten(-3, (-1, 64))
            any_seen, all_seen = squares.any(-1).any(-2), squares.all(-1).all(-2)
            return [bits, any_seen.to(torch.uint8) + all_seen.to(torch.uint8)]

        def pumice(i: int) -> list[Tensor]:
            packed = pack_attention_mask(mask[i % copies])
            return [packed.bits, packed.blocks]

        return Calls(plain, pumice)


CacheCase = Append | CopyBlocks | Merge | MaskPack


def make_inputs(
    case: CacheCase, machine: Machine, device: torch.device, dtype: torch.dtype
) -> Calls:
    return case.make(rotated(case.moved(dtype), machine), device, dtype)


def floor_us(case: CacheCase, machine: Machine, dtype: torch.dtype) -> float:
    return case.moved(dtype) / machine.bandwidth * 1e6


def plain_torch(calls: Calls) -> Contender:
    return calls.plain


def pumice_op(calls: Calls) -> Contender:
    return calls.pumice


PEERS: dict[str, Peer[Calls]] = {BASELINE: plain_torch, "pumice": pumice_op}

BENCH = Bench(
    "cache",
    make_inputs,
    PEERS,
    floor_us,
    kernel_names=("cache_", "merge_attention", "attention_merge", "attention_mask_pack"),
)


def cpu_cases() -> list[CacheCase]:
    return [
        Append(64),
        Append(4096),
        Append(4096, rotary=True),
        Append(4096, stored="fp8"),
        Append(4096, stored="int8"),
        CopyBlocks(64),
        Merge(8, 64),
        Merge(2, 4096),
        MaskPack(1, 4096),
    ]


def cuda_cases() -> list[CacheCase]:
    return [*cpu_cases(), Append(4096, stored="fp8", rotary=True), CopyBlocks(1024), Merge(32, 64)]


CASES = {"cpu": cpu_cases, "cuda": cuda_cases}
