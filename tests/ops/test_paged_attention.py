"""paged_attention against float64, and against flash attention to the same keys."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pumice
from backends import Backend
from cases import FLOATS
from paged_cases import (
    LENGTHS,
    MASKS,
    PAIRS,
    Inputs,
    PagedCase,
    check,
    fitted,
    inputs,
    poison,
    run,
)

BYTES = (torch.float8_e4m3fn, torch.int8)


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_pairs(backend: Backend, index: int) -> None:
    """Every combination of two options; what nobody sees is NaN, its table entries garbage."""
    if backend.name == "emulated" and index % 4:
        pytest.skip("a quarter of the cases: the emulator is slow")
    check(backend, fitted(backend, PAIRS[index]))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(backend: Backend, mask: str, lengths: str) -> None:
    for dtype, block_size in ((torch.bfloat16, 16), (torch.float32, 5)):
        if backend.name == "emulated" and dtype == torch.float32:
            continue
        case = PagedCase(lengths=tuple(LENGTHS[lengths]), mask=mask, dtype=dtype, heads=4,
                         kv_heads=2, block_size=block_size, sinks=lengths == "mixed")  # fmt: skip
        check(backend, fitted(backend, case))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", [None, *BYTES])
def test_long_decode(backend: Backend, dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    """Where keys are cut into parts, whose results are merged."""
    keys = 700 if backend.name == "emulated" else 2600
    for heads, kv_heads in ((8, 2), (16, 1)):
        check(backend, PagedCase(lengths=((1, keys), (1, 90)), heads=heads, kv_heads=kv_heads,
                                 dim=64, value_dim=64, dtype=dtype, cache_dtype=cache_dtype,
                                 scales="head", packed=False, sinks=True))  # fmt: skip


def contiguous(given: Inputs, b: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence, gathered [1, S_k, H_kv, D]."""
    keys, size = given.case.lengths[b][1], given.cache.block_size
    j = torch.arange(keys)
    blocks = given.table[b].long()[j // size].clamp(min=0)
    return given.cache.key[blocks, j % size][None], given.cache.value[blocks, j % size][None]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", ["causal", "full", "window", "streaming"])
def test_bits_of_contiguous_attention(backend: Backend, mask: str, dtype: torch.dtype) -> None:
    """Paged or not, the same bits: for every block size, many queries or one, cut or not."""
    long = 700 if backend.name == "emulated" else 2500
    for lengths, block_size in itertools.product(
        (((1, long), (1, 77)), ((40, 150), (5, 64), (100, 100))), (1, 3, 16, 64, 128)
    ):
        if backend.name == "emulated" and block_size not in (3, 16):
            continue
        case = PagedCase(lengths=lengths, heads=4, kv_heads=2, dim=64, value_dim=48, dtype=dtype,
                         block_size=block_size, mask=mask, sinks=True, softcap=5.0)  # fmt: skip
        given = inputs(case)
        keywords = {"causal": True} | {k: v for k, v in given.keywords.items() if "scale" not in k}
        keywords["sinks"] = keywords["sinks"].to(backend.device)
        for b, (out, lse) in enumerate(run(backend, given)):
            key, value = (x.to(backend.device) for x in contiguous(given, b))
            query = given.queries[b][None].to(backend.device)
            # Neither lets hidden NaNs through, but flash attention may take another path for them.
            key, value = key.nan_to_num(), value.nan_to_num()
            expected, expected_lse = pumice.ops.flash_attention(
                query, key, value, **keywords, return_lse=True
            )
            assert torch.equal(out, expected[0].cpu()), (lengths, block_size)
            assert torch.equal(lse, expected_lse[0].cpu()), (lengths, block_size)


@pytest.mark.parametrize("cache_dtype", [None, *BYTES])
def test_a_row_knows_its_sequence_alone(backend: Backend, cache_dtype: torch.dtype | None) -> None:
    """The same bits alone, in any batch, dense or packed, in any block, and again."""
    for dtype in (torch.bfloat16, torch.float32):
        case = PagedCase(lengths=tuple(LENGTHS["verify"][:2]), heads=4, kv_heads=2, dim=32,
                         value_dim=32, dtype=dtype, cache_dtype=cache_dtype,
                         scales="head")  # fmt: skip
        given = inputs(case)
        together = run(backend, given)
        for again in (given, replace(given, case=replace(case, packed=False)),
                      replace(given, case=replace(case, layout="together"))):  # fmt: skip
            for (out, lse), (other, other_lse) in zip(together, run(backend, again), strict=True):
                assert torch.equal(out, other)
                assert torch.equal(lse, other_lse)
        for b, (out, lse) in enumerate(together):
            alone = replace(given, case=replace(case, lengths=(case.lengths[b],)),
                            queries=[given.queries[b]], table=given.table[b : b + 1])  # fmt: skip
            ((other, other_lse),) = run(backend, alone)
            assert torch.equal(out, other)
            assert torch.equal(lse, other_lse)
        # Blocks in the opposite order in memory.
        last = given.cache.key.shape[0] - 1
        table = torch.where((given.table >= 0) & (given.table <= last), last - given.table, -1)
        cache = replace(given.cache, **{
            name: (x.view(torch.uint8) if x.element_size() == 1 else x).flip(0).view(x.dtype)
            for name, x in (("key", given.cache.key), ("value", given.cache.value))
        })  # fmt: skip
        moved = replace(given, table=table.int(), cache=cache)
        for (out, _), (other, _) in zip(together, run(backend, moved), strict=True):
            assert torch.equal(out, other)


@pytest.mark.parametrize("block_size", [3, 16, 128])
def test_one_row_sees_nan(backend: Backend, block_size: int) -> None:
    """NaN in the last key and value reaches the last query, and no other of its chunk."""
    for dtype in FLOATS if backend.name == "cpu" else (torch.bfloat16,):
        given = inputs(PagedCase(lengths=((20, 70),), dtype=dtype, block_size=block_size))
        ((clean, clean_lse),) = run(backend, given)
        where = torch.zeros(given.cache.key.shape[:2], dtype=torch.bool)
        where[given.table[0, 69 // block_size].item(), 69 % block_size] = True
        poison(given.cache.key, given.cache.value, where)
        ((out, lse),) = run(backend, given)
        assert out[-1].isnan().all()
        unit = 2e-2 if dtype != torch.float32 else 1e-5  # another path than without NaN
        torch.testing.assert_close(out[:-1], clean[:-1], rtol=0, atol=unit)
        assert torch.equal(lse[:, :-1], clean_lse[:, :-1])


def test_shared_blocks(backend: Backend) -> None:
    """Two sequences with one prefix in one place."""
    given = inputs(PagedCase(lengths=((1, 48), (1, 48)), block_size=16, packed=False))
    table = given.table.clone()
    table[1, :3] = table[0, :3]
    shared = replace(given, table=table, queries=[given.queries[0]] * 2)
    (first, _), (second, _) = run(backend, shared)
    assert torch.equal(first, second)


def test_tree_mask_as_bits(backend: Backend) -> None:
    """Bools and packed words are one mask; what lies past a sequence's own queries is nothing."""
    given = inputs(PagedCase(lengths=((40, 90), (3, 5)), mask="tree full", heads=2))
    tree = torch.ones(43, 64, dtype=torch.bool)
    tree[:40, :40], tree[40:, :3] = given.trees[0], given.trees[1]  # type: ignore[index]
    words = (tree.view(43, 2, 32).long() << torch.arange(32)).sum(-1)
    bits = torch.where(words >= 2**31, words - 2**32, words).int()
    for (out, lse), (other, other_lse) in zip(
        run(backend, given), run(backend, given, tree_mask=bits), strict=True
    ):
        assert torch.equal(out, other)
        assert torch.equal(lse, other_lse)


@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks_that_do_not_exist_are_not_touched(backend: Backend, dtype: torch.dtype) -> None:
    """CUDA does not look at the table: keys of such blocks are zero, lengths cut at the table's."""
    if backend.name == "cpu":
        pytest.skip("the CPU refuses them")
    case = PagedCase(lengths=((3, 40), (1, 30)), dtype=dtype, block_size=8, mask="causal")
    given = inputs(case)
    expected = replace(given, table=given.table.clone(), cache=replace(
        given.cache, key=torch.cat([given.cache.key, torch.zeros(1, 8, 1, 16, dtype=dtype)]),
        value=torch.cat([given.cache.value, torch.zeros(1, 8, 1, 16, dtype=dtype)])))  # fmt: skip
    for b, n, entry in ((0, 1, -1), (0, 4, 2**31 - 1), (1, 0, len(given.cache.key))):
        given.table[b, n] = entry
        expected.table[b, n] = len(given.cache.key)  # zeros
    for (out, lse), (other, other_lse) in zip(
        run(backend, given), run(backend, expected), strict=True
    ):
        assert torch.equal(out, other)
        assert torch.equal(lse, other_lse)
    cache = [x.to(backend.device) for x in (given.cache.key, given.cache.value)]
    table = torch.zeros(3, 2, dtype=torch.int32, device=backend.device)
    query = torch.ones(3, 1, 1, 16, dtype=dtype, device=backend.device)
    results = [
        pumice.ops.paged_attention(
            query, *cache, table, torch.tensor(lengths).int().to(query.device)
        )
        for lengths in ([17, 2**31 - 1, -5], [16, 16, 0])
    ]
    assert torch.equal(results[0].nan_to_num(7), results[1].nan_to_num(7))


@pytest.mark.parametrize("cache_dtype", [None, *BYTES])
def test_what_cuda_does_not_have(backend: Backend, cache_dtype: torch.dtype | None) -> None:
    """Refused, by name: never another path in silence."""
    if backend.name == "cpu":
        pytest.skip("the CPU has it")
    message = "_cache must lie on boundaries of 16 bytes on CUDA .* multiple of "
    message += "8 " if cache_dtype is None else "16 "
    dim = 12 if cache_dtype is None else 24
    for changed in ({"dim": dim}, {"value_dim": dim}):
        case = PagedCase(dtype=torch.float16, cache_dtype=cache_dtype, **changed)
        with pytest.raises(RuntimeError, match=message):
            run(backend, inputs(case))
    with pytest.raises(RuntimeError, match="head dims on CUDA must be at most 256, not 272"):
        run(backend, inputs(PagedCase(dim=272, cache_dtype=cache_dtype)))


@pytest.mark.parametrize("shape", [(0, 1), (3, 0), (0, 0)])
def test_nothing_to_do(backend: Backend, shape: tuple[int, int]) -> None:
    batch, queries = shape
    device = backend.device
    cache = torch.full((2, 4, 1, 8), torch.nan, device=device)
    table = torch.full((batch, 0), -1, dtype=torch.int32, device=device)
    lens = torch.zeros(batch, dtype=torch.int32, device=device)
    query = torch.randn(batch, queries, 2, 8, device=device)
    out, lse = pumice.ops.paged_attention(query, cache, cache, table, lens, return_lse=True)
    assert out.shape == query.shape
    assert lse.shape == (batch, 2, queries)


def test_rows_of_no_sequence(backend: Backend) -> None:
    """Before the first and after the last: 0, and an lse of -inf."""
    given = inputs(PagedCase(lengths=((3, 20),)))
    query = torch.cat([torch.full((2, 2, 16), torch.nan), given.queries[0],
                       torch.full((4, 2, 16), torch.nan)]).to(backend.device)  # fmt: skip
    rest = [given.cache.key, given.cache.value, given.table, torch.tensor([20]).int()]
    cu = torch.tensor([2, 5], dtype=torch.int32, device=backend.device)
    out, lse = pumice.ops.paged_attention(
        query, *(x.to(backend.device) for x in rest), cu_seqlens_q=cu, max_seqlen_q=3,
        return_lse=True,
    )  # fmt: skip
    outside = [0, 1, 5, 6, 7, 8]
    assert not out[outside].any()
    assert (lse[:, outside] == -torch.inf).all()
    assert torch.equal(out[2:5].cpu(), run(backend, given)[0][0])


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (10, 5), (48, 6)])
def test_threads_do_not_matter(heads: int, kv_heads: int) -> None:
    """Nor how many KV heads a task takes, which they decide."""
    given = inputs(PagedCase(lengths=((1, 3000), (30, 90)), heads=heads, kv_heads=kv_heads, dim=64,
                             value_dim=64, dtype=torch.bfloat16))  # fmt: skip
    from backends import backend_named

    backend, threads = backend_named("cpu"), torch.get_num_threads()
    results: list[list[Any]] = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([x for pair in run(backend, given) for x in pair])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
