"""What drafts are worth, and the choice of γ."""

import math
import random

import pytest
import torch

from pumice.decode import gamma as gamma_module
from pumice.decode.acceptance import Acceptance, expected_tokens, overlap
from pumice.decode.draft import DraftRequest, Proposal
from pumice.decode.gamma import AdaptiveGamma, PacedDraft


def passes(alpha, gamma, count, generator):
    """How many of γ drafts are kept, when each is with probability α."""
    for _ in range(count):
        kept = 0
        while kept < gamma and generator.random() < alpha:
            kept += 1
        yield kept


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("gamma", [0, 1, 4, 9])
def test_expected_tokens_is_the_sum_of_powers(alpha, gamma):
    assert expected_tokens(alpha, gamma) == pytest.approx(sum(alpha**k for k in range(gamma + 1)))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_expected_tokens_refuses_what_is_no_probability(alpha):
    with pytest.raises(ValueError, match="acceptance"):
        expected_tokens(alpha, 4)


def test_overlap_is_the_chance_that_a_drawn_draft_is_kept():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 40, generator=g).softmax(-1) for _ in range(2))
    # A draft x is drawn with q(x) and kept with min(1, p(x)/q(x)).
    torch.testing.assert_close(overlap(p, q), (q * (p / q).clamp(max=1)).sum(-1))
    # 1 - total variation distance
    torch.testing.assert_close(overlap(p, q), 1 - 0.5 * (p - q).abs().sum(-1))
    torch.testing.assert_close(overlap(p, p), torch.ones(5))
    with pytest.raises(ValueError, match="one shape"):
        overlap(p, q[:2])


def test_the_rate_and_the_tokens_a_pass_agree_with_what_made_them():
    generator = random.Random(0)
    record = Acceptance()
    for kept in passes(0.7, 4, 20_000, generator):
        record.update(4, kept)
    assert record.rate == pytest.approx(0.7, abs=0.01)
    assert record.tokens_per_pass == pytest.approx(expected_tokens(0.7, 4), abs=0.03)
    assert record.drafts_per_pass == 4
    assert record.drafted == 80_000


def test_drafts_after_the_first_rejected_one_were_not_tested():
    record = Acceptance()
    record.update(4, 1)
    assert (record.drafted, record.tested, record.accepted) == (4, 2, 1)
    record.update(4, 4)
    assert (record.drafted, record.tested, record.accepted) == (8, 6, 5)
    record.update(0, 0)
    assert (record.passes, record.tested) == (3, 6)


def test_nothing_measured_is_nan_not_a_number_made_up():
    assert math.isnan(Acceptance().rate)
    assert math.isnan(Acceptance().tokens_per_pass)
    assert Acceptance().rate_given(0.6, 4) == 0.6


def test_a_memory_follows_a_change():
    generator = random.Random(0)
    record, everything = Acceptance(memory=50), Acceptance()
    for alpha in (0.9, 0.1):
        for kept in passes(alpha, 3, 1000, generator):
            record.update(3, kept)
            everything.update(3, kept)
    assert record.rate == pytest.approx(0.1, abs=0.1)
    assert everything.rate > 0.5


@pytest.mark.parametrize("outcome", [(3, 4), (3, -1), (-1, 0)])
def test_impossible_outcomes_are_refused(outcome):
    with pytest.raises(ValueError, match="num_accepted must be in"):
        Acceptance().update(*outcome)


@pytest.mark.parametrize("alpha", [0.05, 0.4, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("cost", [0.0, 0.05, 0.3, 1.5])
def test_the_best_gamma_is_that_of_the_most_tokens_in_simulated_time(alpha, cost):
    adaptive = AdaptiveGamma(8, cost=cost)
    best = adaptive.best(alpha)
    generator = random.Random(0)
    speeds = []
    for gamma in range(9):
        tokens = sum(1 + kept for kept in passes(alpha, gamma, 4000, generator))
        speeds.append(tokens / (4000 * (1 + cost * gamma)))
    assert speeds[best] >= 0.97 * max(speeds)


def test_useless_drafts_are_given_up_and_tried_again_now_and_then():
    adaptive = AdaptiveGamma(6, cost=0.2, explore=10)
    chosen = []
    for _ in range(400):
        adaptive.begin_pass()
        gamma = adaptive.choose(0)
        chosen.append(gamma)
        adaptive.observe(0, gamma, 0)
    assert set(chosen[200:]) == {0, 1}
    assert 12 <= chosen[200:].count(1) <= 14  # two of three trials
    chosen_later = []
    for _ in range(400):  # the text has become easy
        adaptive.begin_pass()
        gamma = adaptive.choose(0)
        chosen_later.append(gamma)
        adaptive.observe(0, gamma, gamma)
    assert max(chosen_later[-30:]) >= 5


def test_each_request_has_its_own_gamma():
    adaptive = AdaptiveGamma(8, cost=0.3)
    for _ in range(60):
        adaptive.begin_pass()
        for id, alpha in ((1, 1.0), (2, 0.0)):
            gamma = max(adaptive.choose(id), 1)
            adaptive.observe(id, gamma, int(alpha * gamma))
    assert adaptive.best(adaptive.acceptance(1)) == 8
    assert adaptive.best(adaptive.acceptance(2)) == 0
    # A new one: everybody's.
    assert adaptive.acceptance(2) < adaptive.acceptance(3) < adaptive.acceptance(1)
    adaptive.forget(2)
    assert adaptive.acceptance(2) == adaptive.acceptance(3)


def test_times_are_measured_through_outliers():
    adaptive = AdaptiveGamma(6)
    assert adaptive.seconds()[0] == 1  # a guess, in no unit
    generator = random.Random(0)
    for _ in range(100):
        for gamma in (0, 2, 3, 6):
            prompt = 50.0 if generator.random() < 0.2 else 0.0  # this pass held a prompt too
            noise = generator.uniform(0.98, 1.02)
            adaptive.observe_time(gamma, (2.0 + 0.5 * gamma) * noise + prompt)
    expected = [2.0 + 0.5 * gamma for gamma in range(7)]
    assert adaptive.seconds() == pytest.approx(expected, rel=0.05)


def test_one_row_may_be_faster_than_the_line_of_more():
    """Where two rows cost half as much again as one, drafts must be worth that first."""
    adaptive = AdaptiveGamma(4)
    for gamma, t in ((2, 3.0), (4, 4.0), (0, 1.0)):
        adaptive.observe_time(gamma, t)
    assert adaptive.seconds() == pytest.approx([1.0, 2.5, 3.0, 3.5, 4.0])
    assert adaptive.best(0.6) == 0
    assert adaptive.best(1.0) == 4


def test_one_point_and_impossible_lines():
    adaptive = AdaptiveGamma(4)
    adaptive.observe_time(2, 2.8)
    assert adaptive.seconds() == pytest.approx([2 * (1 + 0.2 * gamma) for gamma in range(5)])
    adaptive.observe_time(0, 2.0)
    assert adaptive.seconds() == pytest.approx([2.0, 2.4, 2.8, 3.2, 3.6])
    adaptive.observe_time(4, 1.0)  # noise: more drafts in less time
    assert min(adaptive.seconds()[1:]) > 0
    assert sorted(adaptive.seconds()[1:]) == adaptive.seconds()[1:]


def test_the_first_passes_differ_so_that_times_can_be_told():
    adaptive = AdaptiveGamma(6)
    chosen = []
    for _ in range(5):
        adaptive.begin_pass()
        chosen.append(adaptive.choose(0))
    assert set(chosen[1:]) == {0, 3, 6}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_drafts": 0}, "max_drafts"),
        ({"acceptance": 1.5}, "acceptance"),
        ({"cost": -1.0}, "cost"),
        ({"cost": math.inf}, "cost"),
        ({"explore": 1}, "explore"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"AdaptiveGamma: {message}"):
        AdaptiveGamma(**wrong)


class Clocked(PacedDraft):
    """Takes a second a draft by the test's clock."""

    def __init__(self, gamma, clock):
        super().__init__(gamma)
        self.clock = clock

    def draft(self, requests, limits):
        self.clock.now += max(limits, default=0)
        return Proposal.of([[0] * limit for limit in limits])


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


def test_a_paced_draft_times_its_passes_and_finds_the_best_gamma(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(gamma_module, "time", clock)
    generator = random.Random(0)
    draft = Clocked(AdaptiveGamma(8), clock)
    for _ in range(300):
        proposal = draft.propose([DraftRequest(7, [1], 8, None)])
        gamma = int(proposal.num_drafts[0])
        clock.now += 10  # the target's pass
        draft.accepted(7, gamma, next(passes(0.8, gamma, 1, generator)))
        clock.now += 1000  # whatever comes between passes is not counted
    assert draft.gamma.seconds() == pytest.approx([10.0 + gamma for gamma in range(9)])
    exact = AdaptiveGamma(8, cost=0.1).best(0.8)
    assert abs(draft.gamma.best(draft.gamma.acceptance(7)) - exact) <= 1
    assert draft.record.rate == pytest.approx(0.8, abs=0.05)


def test_a_fixed_gamma_is_cut_to_what_a_request_can_use():
    draft = Clocked(4, Clock())
    proposal = draft.propose([DraftRequest(i, [1], n, None) for i, n in enumerate((9, 2, 0))])
    assert proposal.num_drafts.tolist() == [4, 2, 0]
    for id, (given, kept) in enumerate(((4, 3), (2, 2), (0, 0))):
        draft.accepted(id, given, kept)
    assert draft.record == Acceptance(passes=2, drafted=6, tested=6, accepted=5)
    draft.release(0)
