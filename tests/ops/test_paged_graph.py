"""The paged cache's operators under torch.compile, export, meta tensors and CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pumice
from backends import Backend
from paged_cases import PagedCase, caches, inputs, packed_tree


def arguments(backend: Backend, **changed: Any) -> tuple[list[Any], dict[str, Any]]:
    """What Python passes to the operator of a decode, or with a tree of a packed batch."""
    tree = "mask" in changed
    lengths = ((2, 9), (2, 20)) if not tree else ((3, 9), (1, 20))
    given = inputs(PagedCase(lengths=lengths, heads=4, kv_heads=2, block_size=4, **changed))
    cu = torch.tensor([0, 3, 4], dtype=torch.int32) if tree else None
    query = torch.cat(given.queries) if tree else torch.stack(given.queries)
    mask = packed_tree(given)
    words = None if mask is None else (mask.int() << torch.arange(3)).sum(1, keepdim=True).int()
    table = given.table.clamp(0, given.cache.key.shape[0] - 1)  # opcheck reads nothing past them
    lens = torch.tensor([keys for _, keys in lengths], dtype=torch.int32)
    key, value = (x if x.element_size() == 1 else x.nan_to_num() for x in caches(given, "cpu"))
    tensors = [query, key, value, table, lens, cu, given.keywords["sinks"],
               given.keywords["alibi_slopes"], words, given.keywords["k_scale"],
               given.keywords["v_scale"]]  # fmt: skip
    options = {"softmax_scale": 0.3, "max_seqlen_q": 3 if tree else 0, "window_left": 30}
    return [x if x is None else x.to(backend.device) for x in tensors], options


CASES: list[dict[str, Any]] = [
    {},
    {"mask": "tree", "sinks": True, "alibi": "BH"},
    {"cache_dtype": torch.int8, "scales": "head"},
]


@pytest.mark.parametrize("changed", CASES, ids=["plain", "tree", "int8"])
def test_opcheck_attention(backend: Backend, changed: dict[str, Any]) -> None:
    tensors, options = arguments(backend, **changed)
    tensors[0].requires_grad_()
    # The gradient refuses, which is all there is to check of it.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = backend.ops.paged_attention.default
    torch.library.opcheck(op, tuple(tensors), options, test_utils=checks)
    tensors[0].requires_grad_(False)
    torch.library.opcheck(op, tuple(tensors), options)


def test_opcheck_writes(backend: Backend) -> None:
    device = backend.device
    key, cache = torch.randn(3, 2, 8, device=device), torch.zeros(4, 2, 2, 8, device=device)
    slots, table = torch.tensor([3, -1, 0], device=device), torch.ones(9, 3, device=device)
    positions = torch.arange(3, device=device)
    for rotary in ((None, None, None), (table, table.clone(), positions)):
        given = (key, key.clone(), cache, cache.clone(), slots, None, None, *rotary)
        torch.library.opcheck(backend.ops.cache_append.default, given, {"interleaved": True})
    pairs = torch.tensor([[0, 1], [-1, 0]], device=device)
    torch.library.opcheck(backend.ops.cache_copy_blocks.default, (cache, cache.clone(), pairs))


def step(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
    table: Tensor, lens: Tensor, slots: Tensor, angles: Tensor,
) -> Tensor:  # fmt: skip
    """One layer of decoding."""
    pumice.ops.cache_append(key, value, key_cache, value_cache, slots,
                            rotary=(angles.cos(), angles.sin(), lens - 1))  # fmt: skip
    return pumice.ops.paged_attention(
        query[:, None], key_cache, value_cache, table, lens, window=(7, 0), sink_tokens=1
    )


def tensors_of_step(batch: int, device: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(batch)
    blocks = torch.randperm(batch * 5, generator=g).view(batch, 5)
    lens = torch.randint(1, 21, (batch,), generator=g)
    last = lens - 1
    slots = blocks.gather(1, last[:, None] // 4)[:, 0] * 4 + last % 4
    cache = [torch.randn(batch * 5, 4, 2, 8, generator=g) for _ in range(2)]
    new = [torch.randn(batch, heads, 8, generator=g) for heads in (4, 2, 2)]
    angles = torch.rand(30, 3, generator=g)
    return [x.to(device) for x in (*new, *cache, blocks.int(), lens.int(), slots, angles)]


def test_a_step_compiles(backend: Backend) -> None:
    """Writes are seen by what follows, inside a graph as outside."""
    compiled = backend.compile(step)
    for batch in (2, 3, 5):
        tensors, others = (tensors_of_step(batch, backend.device) for _ in range(2))
        with torch.no_grad():
            assert torch.equal(compiled(*tensors), step(*others))
        for x, other in zip(tensors, others, strict=True):
            assert torch.equal(x, other)


def test_meta_tensors() -> None:
    query = torch.empty(2, 3, 4, 8, device="meta", dtype=torch.float16)
    key, value = query.new_empty(5, 16, 2, 8), query.new_empty(5, 16, 2, 6)
    table = torch.empty(2, 4, device="meta", dtype=torch.int32)
    out, lse = pumice.ops.paged_attention(query, key, value, table, table[:, 0], return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 4, 6), torch.float16, "meta")
    assert (lse.shape, lse.dtype) == ((2, 4, 3), torch.float32)
    out, lse = pumice.ops.paged_attention(
        query[0], key, value, table, table[:, 0], cu_seqlens_q=table[0, :3], max_seqlen_q=3,
        return_lse=True,
    )  # fmt: skip
    assert (out.shape, lse.shape) == ((3, 4, 6), (4, 3))
    slots = torch.empty(7, device="meta", dtype=torch.int64)
    pumice.ops.cache_append(key[0, :7], value[0, :7], key, value, slots)
    pumice.ops.cache_copy_blocks(key, value, torch.empty(3, 2, device="meta", dtype=torch.int64))


def test_cuda_graph(backend: Backend) -> None:
    """Captured once, replayed on other lengths and other blocks."""
    if backend.name != "cuda":
        pytest.skip("CUDA graphs")
    tensors, others = tensors_of_step(5, "cuda"), tensors_of_step(5, "cuda")
    with torch.no_grad():
        step(*tensors)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step(*tensors)
        for x, other in zip(tensors, others, strict=True):
            x.copy_(other)
        tensors[6].sub_(1).clamp_(min=1)
        others[6].copy_(tensors[6])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, step(*others))
