"""Trees in the engine: the same tokens as without, whoever comes, goes, waits or fails."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from distribution import FALSE_ALARM, joint, surprise
from engine_runs import assert_nothing_left, first_samples, greedy, random_params, run
from sharp_models import sharp
from tree_drafts import WARM, Wild, continued, prompt

from pumice.decode import Engine, SamplingParams, generate
from pumice.decode.draft_tree import ROOT, NgramTreeDraft, Tree, TreeDraft
from pumice.decode.draft_tree_model import ModelTreeDraft
from pumice.decode.speculative import TreeDecoder

PROMPTS = [prompt(n, seed=n) for n in (5, 17, 9, 30, 4, 12, 24, 8)]
COUNTS = [20 + i for i in range(len(PROMPTS))]
PARAMS = [greedy(count) for count in COUNTS]


@pytest.fixture(scope="module")
def model():
    return sharp("llama")


@pytest.fixture(scope="module")
def other():
    """Another model, that agrees with the first now and then."""
    return sharp("llama", noise=0.15)


@pytest.fixture(scope="module")
def expected(model):
    return [continued(model, text, n) for text, n in zip(PROMPTS, COUNTS, strict=True)]


def knowing(prompts, continuations, **options):
    """Random trees that hold some of the truth."""
    pairs = zip(prompts, continuations, strict=True)
    return Wild({tuple(p[:4]): [*p, *e] for p, e in pairs}, **options)


def engine_of(model, draft, **options):
    return Engine(model, **{"num_blocks": 300, "block_size": 4, "draft": draft, **options})


def assert_empty(engine, draft):
    assert_nothing_left(engine)
    cache = getattr(draft, "cache", None)
    if cache is not None:
        assert cache.manager.stats().used_blocks == 0
    assert not getattr(draft, "_indices", None)


DRAFTS = {
    "wild": lambda other, truth: truth(),
    "wild, many nodes": lambda other, truth: truth(max_nodes=40, seed=1),
    "n-grams": lambda other, truth: NgramTreeDraft(3, 5),
    "other model": lambda other, truth: ModelTreeDraft(other, (3, 2, 1), num_blocks=256),
    "its chain": lambda other, truth: ModelTreeDraft(other, (1, 1, 1), num_blocks=256),
    "short of blocks": lambda other, truth: ModelTreeDraft(
        other, (2, 2), num_blocks=14, block_size=4
    ),
}


@pytest.fixture(params=DRAFTS.values(), ids=DRAFTS)
def draft(request, other, expected):
    return request.param(other, lambda **options: knowing(PROMPTS, expected, **options))


def test_greedy_tokens_are_those_without_a_draft(model, expected, draft):
    """Trees, single tokens and pieces of prompts, all in one pass."""
    engine = engine_of(model, draft, max_batch_tokens=48)
    assert first_samples(engine, PROMPTS, PARAMS, gap=2) == expected
    stats = engine.stats()
    assert 0 < stats.accepted < stats.drafted
    assert stats.passes < 2 * len(PROMPTS) + COUNTS[-1]
    assert_empty(engine, draft)


def test_greedy_tokens_are_the_same_under_preemption(model, expected, draft):
    engine = engine_of(model, draft, num_blocks=26, max_batch_tokens=32, prefix_cache=False)
    assert first_samples(engine, PROMPTS, PARAMS) == expected
    assert engine.stats().preemptions > 0
    assert_empty(engine, draft)


def test_cancelled_requests_leave_the_others_as_they_are(model, expected, draft):
    engine = engine_of(model, draft, num_blocks=60)
    ids = [engine.add(*pair) for pair in zip(PROMPTS, PARAMS, strict=True)]
    tokens = {id: [] for id in ids}
    gone = {0: ids[1], 3: ids[4], 5: ids[0]}
    for step in itertools.count():
        if step in gone and gone[step] in engine._live:
            engine.cancel(gone[step])
        if not engine.has_work:
            break
        for output in engine.step():
            tokens[output.id] += output.tokens
    for id, complete in zip(ids, expected, strict=True):
        assert tokens[id] == (complete[: len(tokens[id])] if id in gone.values() else complete)
    assert_empty(engine, draft)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_of_every_family_and_block(family, block_size):
    model = sharp(family)
    prompts = PROMPTS[:4]
    complete = [continued(model, text, 20) for text in prompts]
    draft = knowing(prompts, complete)
    engine = engine_of(model, draft, num_blocks=900 // block_size, block_size=block_size)
    assert first_samples(engine, prompts, greedy(20), gap=1) == complete
    assert engine.stats().accepted > 20
    assert_empty(engine, draft)


def test_what_an_accepted_path_left_in_the_cache_is_found_by_prompts(model):
    """Its keys were moved, its tokens are those that were kept: a longer prompt goes on from it."""
    text = PROMPTS[2]
    complete = continued(model, text, 60)
    draft = knowing([text], [complete])
    engine = engine_of(model, draft)
    assert first_samples(engine, [text], greedy(40)) == [complete[:40]]
    hits = engine.stats().cache.prompt_hits
    assert first_samples(engine, [[*text, *complete[:40]]], greedy(20)) == [complete[40:]]
    assert engine.stats().cache.prompt_hits - hits == 48


def test_samples_that_branch_off_grow_trees_of_their_own(model, other):
    """They share blocks, which trees write into: each gets a copy of its own first."""
    draft = ModelTreeDraft(other, (2, 2), num_blocks=512)
    engine = engine_of(model, draft)
    params = [random_params(14, seed=10 * i, n=3) for i in range(4)]
    found = run(engine, PROMPTS[:4], params)
    tight = engine_of(model, ModelTreeDraft(other, (2, 2), num_blocks=512), num_blocks=34,
                      max_batch_tokens=24, max_sequences=9)  # fmt: skip
    assert run(tight, PROMPTS[:4], greedy(14, n=3)) == [
        dict.fromkeys(range(3), continued(model, text, 14)) for text in PROMPTS[:4]
    ]
    assert tight.stats().preemptions > 0
    assert all(len(tokens) == 14 for one in found for tokens in one.values())
    assert len({tuple(tokens) for tokens in found[3].values()}) == 3
    assert_empty(engine, draft)


def test_trees_of_the_decoder_and_the_engine_give_the_same(model, other, expected):
    decoder = TreeDecoder(model, ModelTreeDraft(other, (3, 2), num_blocks=256), num_blocks=256)
    engine = engine_of(model, ModelTreeDraft(other, (3, 2), num_blocks=256))
    assert decoder.generate(PROMPTS, PARAMS) == first_samples(engine, PROMPTS, PARAMS) == expected


def test_a_cache_of_bytes_moves_with_the_path(model):
    plain = engine_of(model, None, cache_dtype=torch.int8)
    complete = first_samples(plain, PROMPTS[:3], greedy(20))
    draft = knowing(PROMPTS[:3], complete)
    engine = engine_of(model, draft, cache_dtype=torch.int8)
    assert first_samples(engine, PROMPTS[:3], greedy(20)) == complete
    assert engine.stats().accepted > 10


def test_trees_are_cut_to_what_a_pass_has_room_for(model, expected):
    draft = knowing(PROMPTS, expected, max_nodes=40)
    engine = engine_of(model, draft, max_batch_tokens=16, max_sequences=3)
    most = 0
    schedule = engine.scheduler.schedule

    def noting(drafts):
        nonlocal most
        plan = schedule(drafts)
        most = max(most, len(plan.tokens))
        assert len(plan.tokens) <= 16
        return plan

    engine.scheduler.schedule = noting
    assert first_samples(engine, PROMPTS, PARAMS) == expected
    assert most == 16
    assert engine.stats().accepted > 10


@pytest.fixture(scope="module")
def exact(model):
    return joint(model, prompt(8), 3, WARM)


@pytest.mark.parametrize("kind", ["wild", "model", "n-grams"])
def test_samples_follow_the_model(model, other, exact, kind):
    text = prompt(8) if kind != "n-grams" else [*range(61), *prompt(8)]  # all tokens: all match
    law = exact if kind != "n-grams" else joint(model, text, 3, WARM)
    draft = {
        "wild": lambda: Wild(max_nodes=8, vocabulary=sorted({s[1] for s in law})),
        "model": lambda: ModelTreeDraft(other, (3, 2), num_blocks=8000, block_size=8),
        "n-grams": lambda: NgramTreeDraft(3, 3),
    }[kind]()
    engine = engine_of(
        model, draft, num_blocks=1200, block_size=8, max_batch_tokens=4096, max_sequences=250
    )
    params = [SamplingParams(**{**vars(WARM), "seed": 7 * seed}) for seed in range(2000)]
    assert surprise(map(tuple, first_samples(engine, [text] * 2000, params)), law) < FALSE_ALARM
    assert engine.stats().drafted >= 2000
    assert engine.stats().accepted > 50
    assert_empty(engine, draft)


def test_logprobs_are_those_along_the_path(model, expected):
    params = [greedy(20, logprobs=True), random_params(20, 3, top_k=2, logprobs=True)]
    draft = knowing(PROMPTS[:2], expected[:2])
    engine = engine_of(model, draft)
    ids = [engine.add(*pair) for pair in zip(PROMPTS[:2], params, strict=True)]
    tokens, logprobs = ({id: [] for id in ids} for _ in range(2))
    while engine.has_work:
        for output in engine.step():
            tokens[output.id] += output.tokens
            logprobs[output.id] += output.logprobs
    assert engine.stats().accepted > 3
    for id, text in zip(ids, PROMPTS, strict=False):
        with torch.no_grad():
            scores = model(torch.tensor([text + tokens[id]])).logits[0].log_softmax(-1)
        of = scores[len(text) - 1 : -1].gather(1, torch.tensor(tokens[id])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs[id]), of, rtol=1e-3, atol=1e-3)


def test_many_cancels_under_load_leak_nothing(model, other):
    chance = random.Random(0)
    draft = ModelTreeDraft(other, (2, 1), num_blocks=30, block_size=4)
    engine = engine_of(model, draft, num_blocks=40, max_batch_tokens=40)
    live, finished = set(), 0
    for _ in range(250):
        while len(live) < 8:
            kind = chance.choice([greedy, random_params])
            live.add(engine.add(prompt(chance.randrange(1, 30)), kind(chance.randrange(1, 20))))
        if chance.random() < 0.2:
            id = chance.choice(sorted(live))
            live.remove(id)
            engine.cancel(id)
        for output in engine.step():
            if output.finished:
                assert output.error is None
                live.remove(output.id)
                finished += 1
    assert finished > 60
    assert engine.stats().accepted > 50
    engine.close()
    assert_empty(engine, draft)


def test_a_pass_that_fails_leaves_the_cache_in_order(model, expected):
    draft = knowing(PROMPTS, expected)
    engine = engine_of(model, draft)
    forward, passes, broken = engine.runner.forward, itertools.count(1), 0

    def failing(batch, rows):
        nonlocal broken
        logits = forward(batch, rows)
        if len(batch.seq_lens) > 1 and not next(passes) % 3:
            broken += 1
            raise RuntimeError("out of order")
        return logits

    engine.runner.forward = failing
    assert first_samples(engine, PROMPTS, PARAMS) == expected
    assert broken > 1


class Bad(TreeDraft):
    """Proposes one tree for ever."""

    max_nodes = 9

    def __init__(self, tree):
        self.tree = tree

    def propose(self, requests):
        return [self.tree for _ in requests]


BAD = {
    "each must be -1 or an earlier node": Tree([1, 2], [ROOT, 1]),
    "as many parents as tokens": Tree([1, 2], [ROOT]),
    r"probs, if any, of \[61\] for each": Tree([1], [ROOT], [torch.ones(60)]),
    "not all of the vocabulary of 61": Tree([61], [ROOT]),
    "21 deep where up to": Tree([1] * 21, list(range(-1, 20))),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_tree_is_a_warning_and_costs_nothing(model, expected, message):
    engine = engine_of(model, Bad(BAD[message]))
    with pytest.warns(RuntimeWarning, match=f"Bad failed, this step goes without.*{message}"):
        found = first_samples(engine, PROMPTS[:1], greedy(20))
    assert found == [expected[0][:20]]
    assert engine.stats().drafted == 0


def test_trees_by_one_call(model, expected):
    found = generate(model, PROMPTS, params=PARAMS, draft=NgramTreeDraft(2, 4))
    assert [completion.tokens for completion in found] == expected


def test_what_trees_do_not_go_with_is_refused(model):
    small = sharp("llama")
    small.resize_token_embeddings(50)
    with pytest.raises(ValueError, match=r"ModelTreeDraft: .* 50 tokens, but the target of 61"):
        engine_of(model, ModelTreeDraft(small, num_blocks=8))
    windowed = sharp("mistral")
    windowed.config.sliding_window = 6
    with pytest.raises(ValueError, match="has layers with a window, which trees do not go with"):
        engine_of(windowed, Wild())
    with pytest.raises(ValueError, match="batch_invariant computes each token as a sequence"):
        engine_of(model, Wild(), batch_invariant=True)
