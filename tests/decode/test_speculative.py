"""Speculative decoding in the engine: the same tokens as without a draft, whatever it proposes."""

import random

import pytest
import torch
from distribution import FALSE_ALARM, joint, surprise
from sharp_models import sharp

from pumice.decode.draft import Draft, Proposal
from pumice.decode.draft_compressed import compressed_draft
from pumice.decode.draft_early_exit import EarlyExitDraft
from pumice.decode.draft_model import ModelDraft
from pumice.decode.draft_ngram import NgramDraft
from pumice.decode.engine import Engine
from pumice.decode.gamma import AdaptiveGamma
from pumice.decode.request import SamplingParams
from pumice.quantize import RTN


@pytest.fixture(scope="module")
def model():
    return sharp("llama")


@pytest.fixture(scope="module")
def other():
    """Another model, that agrees with the first now and then."""
    return sharp("llama", noise=0.15)


class Wild(Draft):
    """Any tokens, as many as it likes; with ``drawn``, from any probabilities, a part of which lies
    where the target's does."""

    def __init__(self, max_drafts=4, tokens=range(61), drawn=False):
        self.vocab_size = 61
        self.max_drafts = max_drafts
        self.tokens = list(tokens)
        self.drawn = drawn
        self.generator = torch.Generator().manual_seed(0)
        self.random = random.Random(0)
        self.released = []

    def propose(self, requests):
        limits = [self.random.randint(0, min(self.max_drafts, r.max_drafts)) for r in requests]
        proposal = Proposal.of([self.random.choices(self.tokens, k=n) for n in limits])
        if not self.drawn:
            return proposal
        shape = (*proposal.tokens.shape, len(self.tokens))
        narrow = (2 * torch.randn(shape, generator=self.generator)).softmax(-1)
        picked = narrow.flatten(0, 1).multinomial(1, generator=self.generator)
        tokens = torch.tensor(self.tokens)
        q = torch.zeros(*proposal.tokens.shape, 61).index_copy_(2, tokens, narrow)
        return Proposal(tokens[picked].view_as(proposal.tokens), proposal.num_drafts, q)

    def release(self, id):
        self.released.append(id)


DRAFTS = {
    "ngram": lambda model, other: NgramDraft(5, min_ngram=1),
    "ngram, adaptive": lambda model, other: NgramDraft(AdaptiveGamma(6), min_ngram=1),
    "other model": lambda model, other: ModelDraft(other, 3, num_blocks=256, block_size=4),
    "other, adaptive": lambda model, other: ModelDraft(other, AdaptiveGamma(5), num_blocks=256),
    "itself": lambda model, other: ModelDraft(model, 4, num_blocks=256),
    "short of blocks": lambda model, other: ModelDraft(other, 3, num_blocks=12, block_size=4),
    "early exit": lambda model, other: EarlyExitDraft(model, 1, 3, num_blocks=256),
    "compressed": lambda model, other: compressed_draft(
        model, RTN(bits=8, group_size=16), 3, num_blocks=256
    ),
    "wild": lambda model, other: Wild(),
    "wild, drawn": lambda model, other: Wild(drawn=True),
}


@pytest.fixture(params=DRAFTS, ids=str)
def draft(request, model, other):
    return DRAFTS[request.param](model, other)


def prompt(length, seed=0):
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt(n, seed=n) for n in (3, 17, 9, 30, 5, 12, 24, 8)]


def run(engine, arrivals, cancels=()):
    """Requests enter at their step, those of ``cancels`` leave at theirs; tokens of each."""
    tokens, ids, step = {}, {}, 0
    while engine.has_work or any(at >= step for at, *_ in arrivals):
        for name, (at, text, params) in enumerate(arrivals):
            if at == step:
                ids[engine.add(text, params)] = name
                tokens[name] = []
        for at, name in cancels:
            if at == step and name in ids.values():
                id = next(id for id, one in ids.items() if one == name)
                del ids[id]
                engine.cancel(id)
        for output in engine.step():
            assert output.error is None, output.error
            tokens[ids[output.id]] += output.tokens
            if output.finished:
                del ids[output.id]
        step += 1
    return tokens


def greedy(count=20):
    return SamplingParams(max_new_tokens=count, ignore_eos=True)


def assert_nothing_left(engine, draft):
    assert engine.manager.stats().used_blocks == 0
    assert engine.manager.stats().sequences == 0
    cache = getattr(draft, "cache", None)
    if cache is not None:
        assert cache.manager.stats().used_blocks == 0
        assert cache.manager.stats().sequences == 0
    assert not getattr(draft, "_indices", None)


@pytest.fixture(scope="module")
def plain(model):
    """What the model generates without a draft: requests come at different steps."""
    engine = Engine(model, num_blocks=256, block_size=4)
    return run(engine, [(3 * i, text, greedy(20 + i)) for i, text in enumerate(PROMPTS)])


def test_greedy_tokens_are_those_without_a_draft(model, plain, draft):
    engine = Engine(model, num_blocks=256, block_size=4, draft=draft)
    arrivals = [(3 * i, text, greedy(20 + i)) for i, text in enumerate(PROMPTS)]
    assert run(engine, arrivals) == plain
    assert engine.stats().drafted > 0
    assert_nothing_left(engine, draft)


def test_greedy_tokens_are_the_same_under_preemption(model, plain, draft):
    engine = Engine(
        model, num_blocks=22, block_size=4, max_batch_tokens=24, prefix_cache=False, draft=draft
    )
    arrivals = [(0, text, greedy(20 + i)) for i, text in enumerate(PROMPTS)]
    assert run(engine, arrivals) == plain
    assert engine.stats().preemptions > 0
    assert_nothing_left(engine, draft)


def test_cancelled_requests_leave_the_others_as_they_are(model, plain, draft):
    engine = Engine(model, num_blocks=40, block_size=4, draft=draft)
    arrivals = [(i, text, greedy(20 + i)) for i, text in enumerate(PROMPTS)]
    cancels = [(0, 0), (2, 1), (5, 4), (6, 6)]
    tokens = run(engine, arrivals, cancels)
    gone = {name for _, name in cancels}
    for name, expected in plain.items():
        assert tokens[name] == (expected[: len(tokens[name])] if name in gone else expected)
    assert_nothing_left(engine, draft)


def test_closing_gives_everything_back(model, draft):
    engine = Engine(model, num_blocks=64, block_size=4, draft=draft)
    for text in PROMPTS:
        engine.add(text, greedy(30))
    for _ in range(5):
        engine.step()
    engine.close()
    assert_nothing_left(engine, draft)


def test_many_cancels_under_load_leak_nothing(model, other):
    """Out of blocks in both caches, requests that come, go and are cancelled at random."""
    generator = random.Random(0)
    draft = ModelDraft(other, AdaptiveGamma(4, cost=0.1), num_blocks=20, block_size=4)
    engine = Engine(model, num_blocks=40, block_size=4, max_batch_tokens=40, draft=draft)
    live, finished, cancelled = set(), 0, 0
    for _ in range(400):
        while len(live) < 8:
            temperature = generator.choice([0.0, 1.0])
            params = SamplingParams(
                max_new_tokens=generator.randrange(1, 20), temperature=temperature, ignore_eos=True
            )
            live.add(engine.add(prompt(generator.randrange(1, 30)), params))
        if generator.random() < 0.2:
            id = generator.choice(sorted(live))
            live.remove(id)
            engine.cancel(id)
            cancelled += 1
        for output in engine.step():
            if output.finished:
                assert output.error is None
                live.remove(output.id)
                finished += 1
        assert len(draft.cache._sequences) <= len(live)
    assert finished > 100
    assert cancelled > 50
    assert engine.stats().accepted > 50
    engine.close()
    assert_nothing_left(engine, draft)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_the_target_is_always_right(model, temperature):
    draft = ModelDraft(model, 4, num_blocks=256)
    engine = Engine(model, num_blocks=256, draft=draft)
    params = [
        SamplingParams(max_new_tokens=20, temperature=temperature, seed=i, ignore_eos=True)
        for i in range(8)
    ]
    tokens = run(engine, [(0, text, p) for text, p in zip(PROMPTS, params, strict=True)])
    assert all(len(row) == 20 for row in tokens.values())
    assert draft.record.rate > 0.99  # p and q differ in their last bits
    # The first token comes with the prompt, the others five a pass, the last four in one.
    assert draft.record.tokens_per_pass == pytest.approx(19 / 4, abs=0.1)


def test_a_draft_of_other_tokens_is_refused(model):
    small = sharp("llama")
    small.resize_token_embeddings(50)
    with pytest.raises(ValueError, match=r"ModelDraft.* 50 tokens.* 61"):
        Engine(model, num_blocks=8, draft=ModelDraft(small, 2, num_blocks=8))


@pytest.mark.parametrize("window", [5, 16])
def test_windows_and_drafts_go_together(window):
    """Where drafts are rejected a window moves back to what had left it."""
    model = sharp("mistral")
    model.config.sliding_window = window
    arrivals = [(i, text, greedy(30)) for i, text in enumerate(PROMPTS)]
    plain = run(Engine(model, num_blocks=128, block_size=2), arrivals)
    for draft in (Wild(max_drafts=6), ModelDraft(model, 6, num_blocks=256, block_size=2)):
        engine = Engine(model, num_blocks=256, block_size=2, draft=draft)
        assert run(engine, arrivals) == plain
        assert_nothing_left(engine, draft)


WARM = SamplingParams(max_new_tokens=4, temperature=1.3, top_k=3, ignore_eos=True)


@pytest.fixture(scope="module")
def exact(model):
    return joint(model, prompt(8), 4, WARM)


def drawn(engine, count=2000, batch=100, samples=1):
    """Four tokens after one prompt, by seeds that do not overlap."""
    sequences = []
    for first in range(0, count, batch * samples):
        outputs = {}
        for place in range(batch):
            params = SamplingParams(**{**vars(WARM), "seed": first + place * samples, "n": samples})
            engine.add(prompt(8), params)
        while engine.has_work:
            for output in engine.step():
                outputs.setdefault((output.id, output.index), []).extend(output.tokens)
        sequences += map(tuple, outputs.values())
    assert len(sequences) == count
    return sequences


def engine_with(model, draft):
    return Engine(
        model, num_blocks=2000, block_size=8, max_batch_tokens=2000, max_sequences=200, draft=draft
    )


def test_a_wrong_distribution_is_told(model, other, exact):
    """The test of the tests below: another model's samples are not taken for the target's."""
    assert surprise(drawn(engine_with(other, None)), exact) > 10 * FALSE_ALARM


def test_samples_follow_the_model_without_a_draft(model, exact):
    assert surprise(drawn(engine_with(model, None)), exact) < FALSE_ALARM


@pytest.mark.parametrize("samples", [1, 4])
def test_samples_follow_the_model_whatever_the_draft(model, exact, draft, samples):
    engine = engine_with(model, draft)
    assert surprise(drawn(engine, batch=100 // samples, samples=samples), exact) < FALSE_ALARM
    assert_nothing_left(engine, draft)


class Near(Draft):
    """Guesses among the tokens that are possible: accepting and drawing again both matter.

    Of the possible tokens one is guessed out of hand (``certain``), or drawn from a distribution
    that has little to do with the target's.
    """

    def __init__(self, possible, certain):
        self.vocab_size, self.max_drafts = 61, 2
        self.certain = certain
        self.random = random.Random(0)
        self.following = {}
        for sequence in possible:
            for k, token in enumerate(sequence):
                self.following.setdefault(sequence[:k], set()).add(token)

    def propose(self, requests):
        rows = []
        q = torch.zeros(len(requests), self.max_drafts, 61)
        for b, request in enumerate(requests):
            begun = tuple(request.tokens[8:])
            for k in range(request.max_drafts):
                tokens = sorted(self.following[begun])
                weights = [0.5 ** self.random.randrange(4) for _ in tokens]
                q[b, k, tokens] = torch.tensor(weights) / sum(weights)
                begun = (*begun, *self.random.choices(tokens, weights))
            rows.append(begun[len(request.tokens) - 8 :])
        proposal = Proposal.of(rows)
        if self.certain:
            return proposal
        return Proposal(proposal.tokens, proposal.num_drafts, q[:, : proposal.tokens.shape[1]])


@pytest.mark.parametrize("certain", [True, False])
def test_samples_follow_the_model_where_drafts_are_often_right(model, exact, certain):
    engine = engine_with(model, Near(exact, certain))
    assert surprise(drawn(engine, count=4000), exact) < FALSE_ALARM
    stats = engine.stats()
    assert 0.1 < stats.accepted / stats.drafted < 0.9
    assert stats.drafted > 4000


def test_samples_of_one_request_are_independent_of_each_other(model, other):
    """Pairs of samples, which share a prompt and a draft, follow the product of two models."""
    first = joint(model, prompt(8), 2, WARM)  # the second token is drafted
    pairs = {(*a, *b): p * q for a, p in first.items() for b, q in first.items()}
    two = SamplingParams(max_new_tokens=3, temperature=1.3, top_k=3, ignore_eos=True, n=2)
    engine = engine_with(model, ModelDraft(other, 2, num_blocks=2000))
    seen = []
    for seed in range(0, 4000, 200):
        tokens = {}
        for place in range(100):
            engine.add(prompt(8), SamplingParams(**{**vars(two), "seed": 2 * (seed + place)}))
        while engine.has_work:
            for output in engine.step():
                tokens.setdefault(output.id, {}).setdefault(output.index, []).extend(output.tokens)
        seen += [(*pair[0][:2], *pair[1][:2]) for pair in tokens.values()]
    assert surprise(seen, pairs) < FALSE_ALARM
