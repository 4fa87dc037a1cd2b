"""Continuous batching without a model: who takes part in a pass, and whether its cache is right."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scheduler_driver import VOCABULARY, Driver, next_token, undisturbed

from pumice.decode import BlockManager
from pumice.decode.request import Request
from pumice.decode.scheduler import Scheduler


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=length)


def counts_of(driver: Driver) -> list[dict[int, int]]:
    return [
        {request.id: int(n) for request, n in zip(plan.requests, plan.counts, strict=True)}
        for plan in driver.passes
    ]


def test_one_request_from_prompt_to_end():
    driver = Driver()
    request = driver.add(prompt_of(6), 3)
    driver.run()
    assert request.tokens[6:] == undisturbed(prompt_of(6), 3)
    # The prompt, then each generated token but the last, which nothing follows.
    assert counts_of(driver) == [{0: 6}, {0: 1}, {0: 1}]
    driver.assert_empty()


def test_requests_that_generate_come_before_prompts_that_are_read():
    driver = Driver(32, max_batch_tokens=8)
    driver.add(prompt_of(3), 8)
    driver.step()
    driver.add(prompt_of(17, seed=1), 2)
    driver.run()
    assert counts_of(driver)[:5] == [{0: 3}, {0: 1, 1: 7}, {0: 1, 1: 7}, {0: 1, 1: 3}, {0: 1, 1: 1}]
    driver.assert_as_undisturbed()


def test_requests_join_in_the_pass_after_another_ends():
    driver = Driver(64, max_sequences=2)
    for i in range(4):
        driver.add(prompt_of(4, seed=i), 2 + i)
    driver.run()
    taking_part = [set(counts) for counts in counts_of(driver)]
    assert taking_part == [{0, 1}, {0, 1}, {1, 2}, {2, 3}, {2, 3}, {2, 3}, {3}, {3}]
    driver.assert_as_undisturbed()
    driver.assert_empty()


def test_a_known_prompt_is_not_read_again():
    driver = Driver()
    first = driver.add(prompt_of(10), 2)
    driver.run()
    second = driver.add([*prompt_of(9), 4], 2)
    driver.run()
    assert counts_of(driver)[2] == {1: 2}  # two blocks of four are known
    assert (first.num_cached, second.num_cached) == (0, 8)
    driver.assert_as_undisturbed()


def test_equal_prompts_of_one_pass_are_read_once():
    driver = Driver(64, max_batch_tokens=32)
    requests = [driver.add(prompt_of(10), 3) for _ in range(3)]
    requests.append(driver.add([*prompt_of(5), 9, 9], 3))
    driver.run()
    # Two blocks of four are shared, one by the last; the rest is everybody's own.
    assert counts_of(driver)[0] == {0: 10, 1: 2, 2: 2, 3: 3}
    assert [request.num_cached for request in requests] == [0, 8, 8, 4]
    assert driver.passes[0].step.block_table[1, :2].tolist() == (
        driver.passes[0].step.block_table[0, :2].tolist()
    )
    driver.assert_as_undisturbed()
    driver.assert_empty()


def test_a_prompt_that_is_read_in_pieces_is_shared_as_far_as_it_is_planned():
    driver = Driver(64, max_batch_tokens=9)
    for _ in range(2):
        driver.add(prompt_of(14), 2)
    driver.run()
    # The second comes in beside the last piece of the first, and finds all of it.
    assert counts_of(driver)[:3] == [{0: 9}, {0: 5, 1: 2}, {0: 1, 1: 1}]
    driver.assert_as_undisturbed()


@pytest.mark.parametrize("others", [0, 1])
def test_after_a_failed_pass_nothing_is_found_that_it_should_have_written(others):
    driver = Driver(64)
    poisoned = driver.add(prompt_of(10), 3)
    driver.poison = {poisoned.id}
    for _ in range(others):
        driver.add(prompt_of(10), 3)
    driver.step()
    driver.cache[:] = -1
    while driver.scheduler.has_work:
        driver.step()
    again = driver.add(prompt_of(10), 3)
    assert (driver.manager.match_prefix(prompt_of(10)) > 0) == (others > 0)  # of those that ran
    driver.run()
    assert again.num_generated == 3
    assert driver.failed == [poisoned]
    driver.assert_as_undisturbed()
    driver.assert_empty()


def test_the_youngest_gives_way_and_goes_on_where_it_was():
    driver = Driver(6, max_batch_tokens=32)
    old = driver.add(prompt_of(8), 14)
    young = driver.add(prompt_of(8, seed=1), 14)
    driver.run()
    assert old.preemptions == 0
    assert young.preemptions >= 1
    assert driver.scheduler.preemptions == young.preemptions
    assert len(driver.finished) == 2
    driver.assert_as_undisturbed()
    driver.assert_empty()


def test_a_preempted_request_finds_what_is_left_of_its_blocks():
    driver = Driver(8, max_batch_tokens=32)
    driver.add(prompt_of(14), 6)
    young = driver.add(prompt_of(9, seed=1), 6)
    while not young.preemptions:
        driver.step()
    driver.run()
    assert driver.manager.stats().prompt_hits > 0
    assert young.num_cached == 0  # it says what was known when the request was new
    driver.assert_as_undisturbed()


def test_a_request_that_needs_all_of_the_pool_gets_it():
    driver = Driver(4, max_batch_tokens=3, max_sequences=3)
    driver.add(prompt_of(2), 2)
    big = driver.add(prompt_of(10, seed=1), 7)  # 16 slots: all
    driver.add(prompt_of(2, seed=2), 2)
    driver.run()
    assert big.num_generated == 7
    driver.assert_as_undisturbed()
    driver.assert_empty()


def test_a_request_that_fills_the_pool_is_found_there_again():
    driver = Driver(4, max_batch_tokens=32)
    for _ in range(2):
        request = driver.add(prompt_of(16), 1)
        driver.run()
    assert request.num_cached == 12
    driver.assert_as_undisturbed()


def test_requests_without_room_are_refused():
    driver = Driver(4)
    with pytest.raises(ValueError, match=r"prompt of 10 tokens and max_new_tokens = 8 need room "):
        driver.add(prompt_of(10), 8)
    with pytest.raises(ValueError, match=r"n = 9 samples are more than max_sequences = 8"):
        driver.add(prompt_of(2), 2, n=9)
    assert not driver.scheduler.has_work


def test_the_watermark_is_no_room():
    driver = Driver(100, watermark=0.1)
    assert driver.scheduler.capacity == 90 * 4
    with pytest.raises(ValueError, match=r"10 kept free"):
        driver.add(prompt_of(357), 5)
    driver.add(prompt_of(356), 5)
    driver.run()
    driver.assert_as_undisturbed()


@pytest.mark.parametrize("max_sequences", [0, 5])
def test_max_sequences_must_fit_a_pass(max_sequences):
    with pytest.raises(ValueError, match=r"max_sequences must be in \[1, max_batch_tokens = 4\]"):
        Scheduler(BlockManager(4, 4), 4, max_sequences)


def test_removing_gives_blocks_back_wherever_a_request_is():
    driver = Driver(max_batch_tokens=4, max_sequences=1)
    running, waiting = driver.add(prompt_of(8), 4), driver.add(prompt_of(4), 4)
    driver.step()  # half of the first prompt
    driver.cancel(waiting)
    driver.cancel(running)
    assert not driver.scheduler.has_work
    driver.assert_empty()


def test_samples_share_the_prompt_and_copy_the_block_they_write():
    driver = Driver(max_batch_tokens=16)
    request = driver.add(prompt_of(6), 3, n=3, seed=7)
    driver.run()
    assert counts_of(driver)[0] == {0: 6}
    assert driver.passes[1].step.copies.shape == (2, 2)  # the last to write keeps the block
    assert (
        driver.passes[1].step.block_table[:, 0] == driver.passes[1].step.block_table[0, 0]
    ).all()
    assert sorted(r.seed for r in driver.finished.values()) == [7, 8, 9]
    assert request.forks == 1
    driver.assert_as_undisturbed()
    driver.assert_empty()


def test_samples_count_as_sequences_before_they_branch_off():
    driver = Driver(64, max_sequences=3)
    driver.add(prompt_of(4), 2)
    driver.add(prompt_of(4, seed=1), 2, n=3)
    driver.run()
    assert len(driver.finished) == 4
    assert [len(plan.requests) for plan in driver.passes] == [1, 1, 1, 3]


def right(request: Request) -> list[int]:
    return undisturbed(request.tokens, 3, request.seed)


def half_right(request: Request) -> list[int]:
    first, second, third = undisturbed(request.tokens, 3, request.seed)
    return [first, (second + 1) % VOCABULARY, third]


@pytest.mark.parametrize(("guess", "passes"), [(right, 3), (half_right, 5)])
def test_drafts_save_passes_and_wrong_ones_leave_nothing(guess, passes):
    driver = Driver(guess=guess)
    request = driver.add(prompt_of(6), 9)
    driver.run()
    assert request.num_generated == 9
    assert len(driver.passes) == passes
    driver.assert_as_undisturbed()
    driver.assert_empty()


def test_drafts_are_dropped_before_anybody_is_preempted():
    driver = Driver(2, guess=right)
    driver.add(prompt_of(3), 2)
    driver.add(prompt_of(3, seed=1), 5)
    driver.run()
    assert driver.scheduler.preemptions == 0
    # In the second pass three drafts would need a third block; then the first request has ended.
    assert [int(plan.num_drafts.sum()) for plan in driver.passes] == [0, 0, 2]
    driver.assert_as_undisturbed()


def test_more_drafts_than_fit_a_pass_are_refused():
    driver = Driver(max_batch_tokens=4, max_sequences=2)
    request = driver.add(prompt_of(4), 9)
    driver.step()
    with pytest.raises(ValueError, match="more drafts than max_batch_tokens"):
        driver.scheduler.schedule({request.id: [0, 0, 0, 0]})


def test_after_a_failed_pass_each_of_its_requests_runs_alone_until_it_is_past_that():
    driver = Driver(32, max_batch_tokens=16)
    first, second = driver.add(prompt_of(6), 4), driver.add(prompt_of(5, seed=1), 4)
    third = driver.add(prompt_of(7, seed=2), 4)
    driver.step()
    driver.flaky = 1
    driver.step()
    driver.run()
    alone = [list(counts) for counts in counts_of(driver)[2:]]
    assert alone[:3] == [[first.id], [second.id], [third.id]]
    assert alone[3] == [first.id, second.id, third.id]
    assert len(driver.finished) == 3
    driver.assert_as_undisturbed()
    driver.assert_empty()


def test_the_request_that_cannot_be_computed_fails_alone():
    driver = Driver(12, max_batch_tokens=16, max_sequences=3)
    requests = [driver.add(prompt_of(6 + i, seed=i), 6) for i in range(6)]
    driver.poison = {requests[1].id, requests[4].id}
    driver.run()
    assert driver.failed == [requests[1], requests[4]]
    assert len(driver.finished) == 4
    driver.assert_as_undisturbed()
    driver.assert_empty()


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_requests_end_as_undisturbed_and_no_block_is_lost(seed):
    chance = random.Random(seed)

    def guess(request: Request) -> list[int]:
        drafts = undisturbed(request.tokens, chance.randrange(3), request.seed)
        return [t if chance.random() < 0.7 else chance.randrange(VOCABULARY) for t in drafts]

    max_sequences = chance.randint(3, 6)
    driver = Driver(
        chance.randint(8, 14),
        chance.choice([1, 3, 4]),
        max_batch_tokens=3 * max_sequences,
        max_sequences=max_sequences,
        guess=guess if chance.random() < 0.5 else None,
        prefix_caching=chance.random() < 0.7,
        watermark=chance.choice([0, 0.15]),
    )
    cancelled, wanted = 0, 0
    while len(driver.finished) + len(driver.failed) + cancelled < 60 or driver.scheduler.has_work:
        if wanted < 60 and chance.random() < 0.5:
            most = driver.scheduler.capacity
            new = chance.randint(1, most // 2)
            n = chance.choice([1, 1, 1, 2, 3])
            request = driver.add(
                prompt_of(chance.randint(1, most + 1 - new), chance.randrange(5)), new, n=n,
                seed=chance.randrange(3),
            )  # fmt: skip
            wanted += n
            if chance.random() < 0.05:
                driver.poison.add(request.id)
        if driver.live and chance.random() < 0.1:
            gone = chance.choice(list(driver.live.values()))
            driver.cancel(gone)
            cancelled += gone.forks
        driver.flaky += chance.random() < 0.03
        if driver.scheduler.has_work:
            driver.step()
        elif wanted >= 60:
            break
    assert driver.finished
    driver.assert_as_undisturbed()
    driver.assert_empty()


def test_the_driver_notices_a_wrong_cache():
    """Else the tests above could not fail."""
    driver = Driver()
    request = driver.add(prompt_of(6), 3)
    driver.step()
    driver.cache[driver.manager.block_table(request.sequence)[0] * 4] += 1
    driver.run()
    with pytest.raises(AssertionError):
        driver.assert_as_undisturbed()
    assert next_token([1, 2]) != next_token([4, 1])
    assert np.unique([next_token(prompt_of(5, i)) for i in range(50)]).size == VOCABULARY
