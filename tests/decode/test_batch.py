"""A packed batch: which token stands where."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from forward_passes import poison

from pumice.decode import BlockManager, CachePool, PagedBatch

LAYERS = [(1, 4, 4)]


@pytest.fixture
def pool():
    return poison(CachePool(10, 4, LAYERS, torch.float32))


@pytest.fixture
def manager():
    return BlockManager(10, 4, watermark=0.0, prefix_caching=False)


def test_a_step_of_mixed_sequences(pool, manager):
    ids = [manager.allocate(num_tokens=n).id for n in (5, 0, 2)]
    step = manager.append(ids, counts=[1, 3, 0])
    batch = PagedBatch.from_step(pool, step, [[7], [8, 9, 10], []])
    assert batch.input_ids.tolist() == [7, 8, 9, 10]
    assert batch.positions.tolist() == [5, 0, 1, 2]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 4, 4]
    assert batch.seq_lens.tolist() == [6, 3, 2]
    assert batch.max_seqlen_q == 3
    assert batch.slot_mapping.tolist() == step.slot_mapping.tolist()
    assert batch.block_table.tolist() == step.block_table.tolist()
    assert batch.input_ids.dtype == batch.positions.dtype == batch.slot_mapping.dtype == torch.int64
    assert (
        batch.seq_lens.dtype == batch.cu_seqlens_q.dtype == batch.block_table.dtype == torch.int32
    )
    assert batch.tree_mask is None
    assert batch.attended == []


def test_positions_of_ones_own(pool, manager):
    a = manager.allocate(num_tokens=6).id
    step = manager.append([a], counts=[3])
    sees = torch.eye(3, dtype=torch.bool)
    batch = PagedBatch.from_step(pool, step, [[1, 2, 3]], [[6, 7, 7]], sees)
    assert batch.positions.tolist() == [6, 7, 7]
    assert torch.equal(batch.tree_mask, sees)


def test_copies_come_first(pool, manager):
    a = manager.allocate(num_tokens=5).id
    pool.key_caches[0][:] = torch.arange(10)[:, None, None, None]
    last = manager.block_table(a)[-1]
    (b,) = manager.fork([a])
    step = manager.append([b], counts=[1])
    PagedBatch.from_step(pool, step, [[1]])
    assert pool.key_caches[0][manager.block_table(b)[-1]].eq(last).all()


def test_attention_of_a_layer(pool, manager):
    """Two tokens of one sequence: what is written is what is read, in order."""
    a = manager.allocate(num_tokens=0).id
    batch = PagedBatch.from_step(pool, manager.append([a], counts=[2]), [[1, 2]])
    query, key = torch.randn(2, 2, 4), torch.randn(2, 1, 4)
    value = torch.randn(2, 1, 4)
    out = batch.attend(0, query, key, value, softmax_scale=0.5)
    torch.testing.assert_close(out[0], value[0].expand(2, 4))
    weights = (0.5 * query[1] @ key[:, 0].T).softmax(-1)
    torch.testing.assert_close(out[1], weights @ value[:, 0])
    assert batch.attended == [0]
    with pytest.raises(ValueError, match="layer 1, but the pool has 1 layers"):
        batch.attend(1, query, key, value)
    with pytest.raises(TypeError, match="must be of the dtype of key, bfloat16"):
        batch.attend(0, *(t.bfloat16() for t in (query, key, value)))


@pytest.mark.parametrize(
    ("tokens", "positions", "message"),
    [
        ([[]], None, "needs at least one token"),
        ([[1, 2]], None, "one of 3 tokens of 1 sequences, but tokens holds 2 of 1"),
        ([[1, 2], [3]], None, "one of 3 tokens of 1 sequences, but tokens holds 3 of 2"),
        ([[1, 2, 3]], [[1, 2]], r"one number for each of tokens, not \[2\] for \[3\]"),
    ],
)
def test_tokens_that_are_not_the_steps(pool, manager, tokens, positions, message):
    a = manager.allocate(num_tokens=0).id
    step = manager.append([a], counts=[3])
    with pytest.raises(ValueError, match=message):
        PagedBatch.from_step(pool, step, tokens, positions)


def test_steps_of_another_pool(pool):
    other = BlockManager(200, 4, watermark=0.0)
    ids = [other.allocate(num_tokens=4).id for _ in range(20)]
    step = other.append(ids[10:])
    with pytest.raises(ValueError, match=r"writes to slot .*, but the pool has 10 blocks of 4"):
        PagedBatch.from_step(pool, step, [[1]] * 10)
    a = other.view([ids[0]], [3])
    with pytest.raises(ValueError, match=r"more tokens in this pass than in all: \[3\] of \[1\]"):
        PagedBatch.from_step(pool, a._replace(seq_lens=np.array([1], np.int32)), [[1, 2, 3]])
