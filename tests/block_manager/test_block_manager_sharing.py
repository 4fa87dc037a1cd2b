"""Blocks that several sequences refer to: forks, copies on write, known prefixes."""

from __future__ import annotations

import numpy as np
import pytest

from pumice.decode import BlockManager, OutOfBlocksError


def manager_of(num_blocks: int = 16, **options: object) -> BlockManager:
    return BlockManager(num_blocks, 4, watermark=0, **options)


def computed(manager: BlockManager, tokens: list[int], **options: int) -> int:
    id = manager.allocate(tokens, **options).id
    manager.commit(id)
    return id


def test_fork_shares_every_block_and_takes_none():
    manager = manager_of()
    parent = manager.allocate(range(10)).id
    before = manager.available_blocks
    children = manager.fork([parent, parent])
    assert manager.available_blocks == before
    for child in children:
        assert manager.block_table(child).tolist() == manager.block_table(parent).tolist()
    assert [manager.ref_count(block) for block in manager.block_table(parent)] == [3, 3, 3]
    assert manager.stats().shared_blocks == 3
    assert manager.stats().stored_tokens == 10
    assert manager.stats().tokens == 30


def test_last_to_append_writes_in_place():
    """Parallel sampling: n continuations of one prompt cost n - 1 copies, not n."""
    manager = manager_of()
    parent = manager.allocate(range(10)).id
    ids = [parent, *manager.fork([parent, parent])]
    last = manager.block_table(parent)[-1]
    step = manager.append(ids, [20, 21, 22])
    assert step.copies[:, 0].tolist() == [last, last]
    assert step.block_table[2, 2] == last
    assert len(set(step.block_table[:, 2].tolist())) == 3
    assert (step.block_table[:, :2] == step.block_table[0, :2]).all()
    assert step.slot_mapping.tolist() == [block * 4 + 2 for block in step.block_table[:, 2]]
    # Alone with its block now, each goes on in place.
    assert manager.append(ids, [0, 0, 0]).copies.shape == (0, 2)
    for row, token in zip(step.block_table, [20, 21, 22], strict=True):
        assert manager.block_tokens(row[2]).tolist() == [8, 9, token, 0]


def test_append_to_a_full_shared_block_copies_nothing():
    manager = manager_of()
    parent = manager.allocate(range(8)).id
    (child,) = manager.fork(parent)
    step = manager.append([parent, child], [1, 2])
    assert step.copies.shape == (0, 2)
    assert (step.block_table[0, :2] == step.block_table[1, :2]).all()
    assert step.block_table[0, 2] != step.block_table[1, 2]


def test_beam_search():
    """Each step keeps some beams, several times over, and drops the others; none leaks."""
    manager = manager_of(64)
    random = np.random.default_rng(0)
    beams = manager.fork([manager.allocate(range(9)).id] * 4)
    for _ in range(50):
        parents = random.choice(beams, 4)
        survivors = manager.fork(parents)
        manager.free(beams)
        beams = survivors
        manager.append(beams, random.integers(0, 9, 4))
    assert manager.stats().sequences == 5
    assert manager.stats().waste <= 5 * 3
    manager.free([0, *beams])
    assert manager.available_blocks == 64


def test_copy_needs_a_block_and_says_so():
    manager = manager_of(2)
    parent = manager.allocate(range(6)).id
    (child,) = manager.fork(parent)
    assert not manager.can_append([parent, child])
    with pytest.raises(OutOfBlocksError, match="2 tokens to 2 sequences need 1 blocks; 0 of 2"):
        manager.append([parent, child], [1, 2])
    assert manager.num_tokens(parent) == manager.num_tokens(child) == 6
    assert manager.stats().shared_blocks == 2
    manager.free(parent)
    assert manager.append(child, [1]).copies.shape == (0, 2)


def test_prompt_finds_a_known_prefix():
    manager = manager_of()
    first = computed(manager, [*range(8), 50, 51])
    second = manager.allocate([*range(8), 60, 61])
    assert second.cached_tokens == 8
    assert manager.block_table(second.id)[:2].tolist() == manager.block_table(first)[:2].tolist()
    assert second.slot_mapping.tolist() == [
        manager.block_table(second.id)[2] * 4 + i for i in (0, 1)
    ]
    stats = manager.stats()
    assert (stats.prompt_tokens, stats.prompt_hits) == (20, 8)


def test_some_token_is_left_to_compute():
    manager = manager_of()
    computed(manager, list(range(8)))
    assert manager.match_prefix(range(8)) == 4
    assert manager.match_prefix(range(9)) == 8
    assert manager.match_prefix([]) == 0


def test_what_is_not_committed_is_not_found():
    """Chunked prefill: a prompt must not find blocks whose keys are yet to be computed."""
    manager = manager_of()
    prompt = list(range(13))
    first = manager.allocate(prompt, limit=8)
    assert first.num_tokens == 8
    assert manager.match_prefix(prompt) == 0
    manager.commit(first.id, [5])
    assert manager.match_prefix(prompt) == 4
    manager.append(first.id, prompt[8:], counts=[5])
    assert manager.match_prefix(prompt) == 4
    manager.commit(first.id)
    assert manager.match_prefix(prompt) == 12


def test_generated_tokens_are_found_by_the_next_turn():
    manager = manager_of()
    id = computed(manager, list(range(6)))
    for token in range(6, 12):
        manager.append(id, token)
    manager.commit(id)
    manager.free(id)
    assert manager.allocate(range(20)).cached_tokens == 12


def test_prefix_must_agree_from_the_start():
    manager = manager_of()
    computed(manager, [1, 2, 3, 4, 5, 6, 7, 8])
    assert manager.match_prefix([9, 2, 3, 4, 5, 6, 7, 8, 0]) == 0
    assert manager.match_prefix([1, 2, 3, 4, 9, 6, 7, 8, 0]) == 4
    assert manager.match_prefix([5, 6, 7, 8, 0]) == 0


def test_extra_keys_are_kept_apart():
    manager = manager_of()
    computed(manager, list(range(8)), extra_key=7)
    assert manager.match_prefix(range(9)) == 0
    assert manager.match_prefix(range(9), extra_key=-7) == 0
    assert manager.match_prefix(range(9), extra_key=7) == 8


@pytest.mark.parametrize("bits", [0, 1])
def test_colliding_hashes_give_no_wrong_hit(bits):
    """With so few bits of hash all blocks collide; the tokens tell them apart."""
    manager = manager_of(64, _hash_bits=bits)
    random = np.random.default_rng(1)
    prompts = random.integers(0, 3, (12, 9))
    for prompt in prompts:
        computed(manager, prompt)
    for prompt in random.integers(0, 3, (50, 9)):
        expected = 0
        for known in prompts:
            agree = [*(known[:8] == prompt[:8]).tolist(), False]
            expected = max(expected, agree.index(False) // 4 * 4)
        assert manager.match_prefix(prompt) == expected


def test_least_recently_used_prefix_is_evicted_tail_first():
    manager = manager_of(6)
    first, second = computed(manager, [1] * 12), computed(manager, [2] * 12)
    manager.free(first)
    manager.free(second)
    assert (manager.stats().cached_blocks, manager.stats().free_blocks) == (6, 0)
    manager.free(manager.allocate([1] * 8 + [9]).id)  # renews the first, and evicts its tail
    assert manager.stats().evictions == 1
    assert manager.match_prefix([1] * 13) == 8
    assert manager.match_prefix([2] * 13) == 12
    manager.allocate(num_tokens=8)  # one free block, and the tail of the second
    assert manager.match_prefix([1] * 13) == 8
    assert manager.match_prefix([2] * 13) == 8
    assert manager.stats().evictions == 2


def test_used_blocks_are_never_evicted():
    manager = manager_of(4)
    id = computed(manager, [1] * 8)
    manager.allocate(num_tokens=8)
    assert not manager.can_allocate(num_tokens=1)
    assert manager.match_prefix([1] * 9) == 8
    # A prompt that finds all but its last block needs one more, not three.
    with pytest.raises(OutOfBlocksError, match=r"9 tokens \(8 of them cached\) need 1 "):
        manager.allocate([1] * 9)
    assert manager.ref_count(manager.block_table(id)[0]) == 1


def test_the_same_prompt_twice_at_once_is_kept_once():
    """Both compute it before either is committed; the first is found, neither is disturbed."""
    manager = manager_of()
    first, second = manager.allocate([3] * 8).id, manager.allocate([3] * 8).id
    manager.commit([first, second])
    assert manager.stats().indexed_blocks == 2
    third = manager.allocate([3] * 9)
    assert manager.block_table(third.id)[:2].tolist() == manager.block_table(first).tolist()
    manager.append(second, [5] * 4, counts=[4])
    manager.commit(second)
    assert manager.match_prefix([3] * 8 + [5] * 5) == 12  # found through the first's blocks


def test_cut_into_a_known_block_forgets_it_before_it_is_written():
    manager = manager_of()
    id = computed(manager, list(range(8)))
    block = manager.block_table(id)[1]
    manager.truncate(id, 6)
    assert manager.match_prefix(range(9)) == 8  # the keys are there still
    step = manager.append(id, 99)
    assert step.slot_mapping.tolist() == [block * 4 + 2]
    assert manager.match_prefix(range(9)) == 4
    manager.append(id, 98)
    manager.commit(id)
    assert manager.match_prefix([0, 1, 2, 3, 4, 5, 99, 98, 0]) == 8


def test_cut_into_a_block_that_another_found_copies_it():
    manager = manager_of()
    id = computed(manager, list(range(8)))
    other = manager.allocate(range(9)).id
    block = manager.block_table(id)[1]
    manager.truncate(id, 6)
    step = manager.append(id, 99)
    assert step.copies.tolist() == [[block, step.block_table[0, 1]]]
    assert manager.block_table(other)[1] == block
    assert manager.block_tokens(block).tolist() == [4, 5, 6, 7]


def test_rejected_drafts_give_their_blocks_back():
    """Speculative decoding: append a draft, commit and keep what was accepted."""
    manager = manager_of()
    ids = [manager.allocate(range(6)).id, manager.allocate(range(3)).id]
    step = manager.append(ids, range(10), counts=[5, 5])
    assert step.seq_lens.tolist() == [11, 8]
    manager.truncate(ids, [7, 8])
    assert [len(manager.block_table(id)) for id in ids] == [2, 2]
    assert manager.stats().used_blocks == 4
    assert manager.append(ids, [1, 1]).seq_lens.tolist() == [8, 9]


def test_unknown_tokens_are_never_shared_by_content():
    manager = manager_of()
    id = manager.allocate(num_tokens=8).id
    manager.append(id, [5] * 4, counts=[4])
    manager.commit(id)
    assert manager.stats().indexed_blocks == 0
    assert manager.block_tokens(manager.block_table(id)[0]).tolist() == [-1] * 4


def test_clear_cache_leaves_sequences_alone():
    manager = manager_of()
    kept, gone = computed(manager, [1] * 8), computed(manager, [2] * 8)
    manager.free(gone)
    manager.clear_cache()
    stats = manager.stats()
    assert (stats.cached_blocks, stats.indexed_blocks, stats.used_blocks) == (0, 0, 2)
    assert manager.match_prefix([1] * 9) == 0
    manager.append(kept, [1] * 4, counts=[4])
    manager.commit(kept)  # its beginning is of before: nothing that follows may be found
    assert manager.stats().indexed_blocks == 0


def test_without_prefix_caching_nothing_is_kept():
    manager = manager_of(prefix_caching=False)
    id = computed(manager, [1] * 8)
    assert manager.match_prefix([1] * 9) == 0
    manager.append(id)  # tokens need not be given
    manager.free(id)
    assert manager.stats().free_blocks == 16
