"""What paging is for: nearly all of the memory holds tokens."""

from __future__ import annotations

import pytest

from bench.block_manager import (
    Request,
    _Buddy,
    _FirstFit,
    chat_trace,
    contiguous,
    memory_table,
    paged,
)


def test_memory_use_on_a_chat_trace():
    """The paper: 96 % with paging, 20 to 38 % with contiguous reservations of its three kinds."""
    table = {row.name: row for row in memory_table(requests=1000)}
    assert table["paged"].of_reserved >= 0.96
    assert table["paged"].of_pool >= 0.96
    assert 0.15 <= table["max"].of_pool <= 0.25
    assert table["max"].of_pool < table["pow2"].of_pool < table["oracle"].of_pool <= 0.45
    # Even where every length is known beforehand and nothing is rounded.
    assert table["oracle, first-fit"].of_pool <= 0.65
    assert table["paged"].running > 2 * table["oracle"].running


@pytest.mark.parametrize("block_size", [8, 32])
def test_waste_is_half_a_block_a_sequence(block_size):
    trace = chat_trace(400)
    memory = paged(trace, 1 << 15, block_size)
    waste = (1 - memory.of_reserved) / memory.of_reserved * memory.of_pool * (1 << 15)
    assert waste / memory.running == pytest.approx(block_size / 2, rel=0.15)


def test_trace_has_the_lengths_it_claims():
    trace = chat_trace(4000)
    assert 130 <= sum(r.prompt for r in trace) / 4000 <= 161
    assert 290 <= sum(r.output for r in trace) / 4000 <= 338
    assert max(r.prompt + r.output for r in trace) <= 2048
    assert chat_trace(50) == chat_trace(50) != chat_trace(50, seed=1)


@pytest.mark.parametrize("memory", [_Buddy(1024), _FirstFit(1024)], ids=["buddy", "first fit"])
def test_contiguous_pieces_do_not_overlap(memory):
    pieces: list[tuple[int, int]] = []
    for round in range(200):
        size = 1 + round * 37 % 150
        begin = memory.take(size)
        if begin is None:
            assert pieces
            for piece in pieces[::2]:
                memory.give_back(*piece)
            pieces = pieces[1::2]
            continue
        assert 0 <= begin <= 1024 - size
        assert all(begin + size <= b or b + s <= begin for b, s in pieces)
        pieces.append((begin, size))
    for piece in pieces:
        memory.give_back(*piece)
    assert memory.take(1024) == 0


def test_impossible_traces_are_refused():
    with pytest.raises(ValueError, match="no request ever waited"):
        paged([Request(4, 4)], 1024)
    with pytest.raises(ValueError, match="more than the 1024 slots"):
        contiguous([Request(4, 4)], 1024, "max")
