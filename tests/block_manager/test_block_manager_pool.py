"""The pool and its limits: windows, watermark, padding, refusals, threads."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest

from pumice.decode import (
    BlockManager,
    DoubleFreeError,
    OutOfBlocksError,
    UnknownSequenceError,
)


def test_window_runs_for_ever_in_constant_memory():
    """StreamingLLM: sinks and a window; positions count on, the blocks between come back."""
    manager = BlockManager(8, 4, prefix_caching=False, watermark=0, window_left=9, sink_tokens=5)
    id = manager.allocate(num_tokens=3).id
    for length in range(4, 1000):
        step = manager.append(id)
        assert step.seq_lens.tolist() == [length]
        table = step.block_table[0]
        query = length - 1
        for index, block in enumerate(table):
            seen = any(j < 5 or j >= query - 9 for j in range(index * 4, index * 4 + 4))
            assert (block != -1) == seen
        assert manager.stats().used_blocks <= 2 + 4
        assert step.slot_mapping.tolist() == [table[query // 4] * 4 + query % 4]
    manager.free(id)
    assert manager.stats().free_blocks == 8


def test_chunk_keeps_what_its_first_query_sees():
    manager = BlockManager(16, 4, prefix_caching=False, watermark=0, window_left=4)
    id = manager.allocate(num_tokens=16).id
    table = manager.append(id, counts=[12]).block_table[0]
    # The first query of the chunk stands at 16 and sees from 12 on.
    assert table.tolist()[:3] == [-1] * 3
    assert (table[3:] >= 0).all()


def test_window_makes_room_for_its_own_growth():
    manager = BlockManager(3, 4, prefix_caching=False, watermark=0, window_left=4)
    id = manager.allocate(num_tokens=12).id
    assert manager.available_blocks == 0
    assert manager.can_append(id)
    assert manager.append(id).block_table[0].tolist() == [-1, -1, 2, 0]


def test_prompt_refers_only_to_what_its_window_shows():
    manager = BlockManager(16, 4, watermark=0, window_left=4, sink_tokens=1)
    first = manager.allocate(range(17)).id
    manager.commit(first)
    manager.free(first)
    second = manager.allocate([*range(16), 99])
    assert second.cached_tokens == 16
    assert (manager.block_table(second.id) >= 0).tolist() == [True, False, False, True, True]
    assert manager.stats().cached_blocks == 2
    assert manager.match_prefix(range(17)) == 16


def test_cut_behind_the_window_is_refused():
    manager = BlockManager(16, 4, prefix_caching=False, watermark=0, window_left=4)
    id = manager.allocate(num_tokens=16).id
    manager.append(id, counts=[8])
    manager.truncate(id, 16)
    with pytest.raises(ValueError, match="before token 12 left the window"):
        manager.truncate(id, 15)
    assert manager.num_tokens(id) == 16
    manager.truncate(id, 0)
    assert manager.stats().used_blocks == 0


def test_view_does_not_give_slots_of_reclaimed_tokens():
    manager = BlockManager(16, 4, prefix_caching=False, watermark=0, window_left=4)
    id = manager.allocate(num_tokens=16).id
    manager.append(id)
    assert manager.view(id, [5]).slot_mapping.tolist()[:4] == [12, 13, 14, 15]
    with pytest.raises(ValueError, match="token 8 of sequence 0 left the window"):
        manager.view(id, [6])


def test_view_puts_a_batch_together():
    manager = BlockManager(16, 4, watermark=0)
    old = manager.allocate(range(5)).id
    manager.append(old, 9)
    new = manager.allocate(range(20, 26))
    step = manager.view([new.id, old], [6, 1], width=4)
    assert step.slot_mapping.tolist() == [*new.slot_mapping.tolist(), 5]
    assert step.block_table.tolist() == [[2, 3, -1, -1], [0, 1, -1, -1]]
    assert step.seq_lens.tolist() == [6, 6]


def test_watermark_binds_new_sequences_only():
    manager = BlockManager(10, 4, watermark=0.25)
    assert manager.watermark_blocks == 2
    id = manager.allocate(num_tokens=4 * 8).id
    assert not manager.can_allocate(num_tokens=1)
    with pytest.raises(OutOfBlocksError, match="need 1 blocks beside the watermark of 2; 2 of 10"):
        manager.allocate(num_tokens=1)
    assert manager.can_append(id, [8])
    manager.append(id, counts=[8], tokens=[0] * 8)
    assert manager.available_blocks == 0
    assert not manager.can_append(id)


def test_refusal_says_what_and_changes_nothing():
    manager = BlockManager(4, 4, watermark=0)
    ids = [manager.allocate(range(i, i + 4)).id for i in (0, 10, 20)]
    tables = [manager.block_table(id).tolist() for id in ids]
    before = manager.stats()
    with pytest.raises(OutOfBlocksError) as refusal:
        manager.append(ids, [1, 2, 3])
    assert str(refusal.value) == (
        "append: 3 tokens to 3 sequences need 3 blocks; 1 of 4 are available"
    )
    assert (refusal.value.needed, refusal.value.available) == (3, 1)
    assert manager.stats() == before
    assert [manager.block_table(id).tolist() for id in ids] == tables
    manager.append(ids[0], [1])


def test_prompt_longer_than_the_pool():
    manager = BlockManager(4, 4)
    with pytest.raises(OutOfBlocksError, match=r"17 tokens \(0 of them cached\) need 5 "):
        manager.allocate(num_tokens=17)
    assert manager.stats().sequences == 0


def test_reserved_block_is_only_padding():
    manager = BlockManager(4, 4, watermark=0, null_block=0)
    assert manager.num_blocks == 3
    ids = [manager.allocate(num_tokens=n).id for n in (8, 4)]
    step = manager.view(ids)
    assert step.block_table[1, 1] == 0
    assert 0 not in step.block_table[0]
    assert not manager.can_allocate(num_tokens=1)


def test_empty_calls_and_empty_sequences():
    manager = BlockManager(4, 4)
    empty = manager.allocate([])
    assert (empty.num_tokens, empty.slot_mapping.shape) == (0, (0,))
    step = manager.view(empty.id, [0])
    assert step.seq_lens.tolist() == [0]
    assert step.block_table.shape == (1, 0)
    assert manager.append([], []).block_table.shape == (0, 0)
    manager.free([])
    assert manager.append(empty.id, 5).slot_mapping.tolist() == [0]


ERRORS = [
    (UnknownSequenceError, "append: there is no sequence 7", lambda m: m.append(7, 0)),
    (UnknownSequenceError, "append: there is no sequence -1", lambda m: m.append(-1, 0)),
    (UnknownSequenceError, "append: sequence 1 was freed", lambda m: m.append([0, 1], [0, 0])),
    (UnknownSequenceError, "fork: sequence 1 was freed", lambda m: m.fork([0, 1])),
    (UnknownSequenceError, "commit: there is no sequence 9", lambda m: m.commit([0, 9])),
    (UnknownSequenceError, "free: there is no sequence 9", lambda m: m.free([0, 9])),
    (UnknownSequenceError, "block_table: sequence 1 was freed", lambda m: m.block_table(1)),
    (DoubleFreeError, "free: sequence 1 was freed before", lambda m: m.free([0, 1])),
    (DoubleFreeError, "free: sequence 0 is named twice", lambda m: m.free([0, 0])),
    (ValueError, "append: sequence 0 is named twice", lambda m: m.append([0, 0], [1, 2])),
    (ValueError, "counts must not be negative, not -2", lambda m: m.append(0, [], [-2])),
    (ValueError, "append: 1 ids, but 2 counts", lambda m: m.append(0, [1, 1], [1, 1])),
    (ValueError, "1 tokens are to be appended, but 2", lambda m: m.append(0, [1, 2])),
    (ValueError, "tokens must be given", lambda m: m.append(0)),
    (ValueError, r"tokens must be in \[0, 2\^31\), not -1", lambda m: m.append(0, -1)),
    (ValueError, "not 2147483648", lambda m: m.append(0, 2**31)),
    (ValueError, "must stay shorter than 2^29", lambda m: m.append(0, [], [2**29])),
    (ValueError, "width must be at least 2 blocks and", lambda m: m.append(0, 1, width=1)),
    (ValueError, "less than 2^29, not 1099511627776", lambda m: m.append(0, 1, width=2**40)),
    (ValueError, "width must be at least 2 blocks and", lambda m: m.view(0, width=0)),
    (ValueError, "view: sequence 0 has 6 tokens, not 7", lambda m: m.view(0, 7)),
    (ValueError, "commit: sequence 0 has 6 tokens, not 7", lambda m: m.commit(0, 7)),
    (ValueError, "lengths must not be negative, not -1", lambda m: m.commit(0, -1)),
    (ValueError, "of 6 tokens cannot be cut to 7", lambda m: m.truncate(0, 7)),
    (ValueError, "of 6 tokens cannot be cut to -1", lambda m: m.truncate(0, -1)),
    (ValueError, "truncate: 1 ids, but 2 lengths", lambda m: m.truncate(0, [1, 2])),
    (ValueError, "num_tokens must not be negative, not -3", lambda m: m.allocate(num_tokens=-3)),
    (ValueError, "limit must not be negative, not -3", lambda m: m.allocate([1], limit=-3)),
    (ValueError, "shorter than 2^29 tokens", lambda m: m.allocate(num_tokens=2**29)),
    (ValueError, "either tokens or num_tokens", lambda m: m.allocate()),
    (ValueError, "either tokens or num_tokens", lambda m: m.allocate([1], num_tokens=1)),
    (ValueError, "tokens must be a vector, not of 2", lambda m: m.allocate([[1]])),
    (ValueError, r"block must be in \[0, 8\), not 8", lambda m: m.ref_count(8)),
    (ValueError, r"block must be in \[0, 8\), not -1", lambda m: m.block_tokens(-1)),
    (TypeError, "ids must be integers, not float64", lambda m: m.append([0.0], [1])),
    (TypeError, "tokens must be integers, not bool", lambda m: m.allocate([True])),
]


@pytest.mark.parametrize(("error", "text", "call"), ERRORS, ids=[text for _, text, _ in ERRORS])
def test_errors_by_name(error, text, call):
    """Each says what came; none changes anything, though a right argument came beside it."""
    manager = BlockManager(8, 4, watermark=0)
    manager.allocate(range(6))
    manager.free(manager.allocate(range(3)).id)
    before = manager.stats()
    pattern = text if "\\" in text else re.escape(text)
    with pytest.raises(error, match=pattern):
        call(manager)
    assert manager.stats() == before
    assert manager.num_tokens(0) == 6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_blocks": 0}, "num_blocks must be in"),
        ({"num_blocks": -5}, "not -5"),
        ({"block_size": 0}, "block_size must be in"),
        ({"watermark": 1.0}, "watermark must be in"),
        ({"watermark": -0.1}, "watermark must be in"),
        ({"watermark": float("nan")}, "watermark must be in"),
        ({"window_left": -1}, "window_left must be in"),
        ({"sink_tokens": -1}, "sink_tokens must be in"),
        ({"null_block": 8}, "null_block must be -1, or a block of the 8, not 8"),
        ({"null_block": 0, "num_blocks": 1}, "at least 2 where null_block reserves one"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=text):
        BlockManager(**{"num_blocks": 8, "block_size": 4, **options})


def test_two_threads():
    """Each has its own sequences and prompts in common; the account is right at every moment."""
    manager = BlockManager(512, 4, watermark=0)
    failures: list[BaseException] = []
    start = threading.Barrier(3)

    def serve(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            start.wait()
            ids: list[int] = []
            for _ in range(1500):
                try:
                    prompt = np.arange(random.integers(1, 40)) // random.integers(1, 3)
                    ids.append(manager.allocate(prompt).id)
                    ids += manager.fork(ids[-1]).tolist()
                    step = manager.append(ids, random.integers(0, 9, len(ids)))
                    manager.commit(ids)
                    written = step.slot_mapping.tolist()
                    assert len(set(written)) == len(ids)
                except OutOfBlocksError:
                    pass
                if len(ids) > 20:
                    manager.free(ids[:10])
                    del ids[:10]
            manager.free(ids)
        except BaseException as failure:
            failures.append(failure)

    def audit() -> None:
        try:
            start.wait()
            while any(thread.is_alive() for thread in threads[:2]):
                stats = manager.stats()
                assert stats.free_blocks + stats.cached_blocks + stats.used_blocks == 512
                assert stats.waste <= 3 * stats.sequences
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in (1, 2)]
    threads.append(threading.Thread(target=audit))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not failures
    stats = manager.stats()
    assert (stats.sequences, stats.used_blocks, stats.tokens) == (0, 0, 0)
    assert manager.available_blocks == 512
    assert stats.prompt_hits > 0
