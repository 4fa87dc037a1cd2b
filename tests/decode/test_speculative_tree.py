"""Speculative decoding by trees: the same tokens as without, whatever the trees."""

import pytest
import torch
from distribution import FALSE_ALARM, joint, surprise
from sharp_models import sharp
from tree_drafts import GREEDY, WARM, Wild, continued, prompt

from pumice.decode.block_manager import OutOfBlocksError
from pumice.decode.draft_tree import NgramTreeDraft
from pumice.decode.draft_tree_model import ModelTreeDraft
from pumice.decode.request import SamplingParams
from pumice.decode.speculative import TreeDecoder


@pytest.fixture(scope="module")
def model():
    return sharp("llama")


@pytest.fixture(scope="module")
def other():
    """Another model, that agrees with the first now and then."""
    return sharp("llama", noise=0.15)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_greedy_tokens_are_those_without_trees(family, block_size):
    model = sharp(family)
    prompts = [prompt(n, seed=n) for n in (4, 13, 7)]
    expected = [continued(model, text, 24) for text in prompts]
    truth = {tuple(p[:4]): [*p, *e] for p, e in zip(prompts, expected, strict=True)}
    draft = Wild(truth)
    decoder = TreeDecoder(model, draft, num_blocks=800 // block_size, block_size=block_size)
    assert decoder.generate(prompts, GREEDY) == expected
    assert decoder.record.tokens_per_pass > 2
    assert decoder.manager.stats().used_blocks == 0
    assert len(draft.released) == 3


def test_wrong_trees_cost_nothing_but_time(model):
    text = prompt(9)
    decoder = TreeDecoder(model, Wild(), num_blocks=64)
    assert decoder.generate([text], GREEDY) == [continued(model, text, 24)]
    assert decoder.record.passes > 20


def test_a_quantized_cache_moves_with_the_path(model):
    """With a cache of bytes the tokens are those of chains over such a cache."""
    texts = [prompt(n, seed=n) for n in (5, 9)]
    plain = TreeDecoder(model, Wild(max_nodes=1), num_blocks=64, cache_dtype=torch.int8)
    expected = plain.generate(texts, GREEDY)
    assert plain.record.drafted == 0
    truth = {tuple(p[:4]): [*p, *e] for p, e in zip(texts, expected, strict=True)}
    decoder = TreeDecoder(model, Wild(truth), num_blocks=64, cache_dtype=torch.int8)
    assert decoder.generate(texts, GREEDY) == expected
    assert decoder.record.tokens_per_pass > 1.5


@pytest.mark.parametrize("widths", [(3, 2, 1), (1, 1, 1, 1), (2,)])
def test_a_model_that_is_the_target_is_followed_to_the_end(model, widths):
    texts = [prompt(n, seed=n) for n in (6, 11)]
    draft = ModelTreeDraft(model, widths, num_blocks=128, block_size=4)
    decoder = TreeDecoder(model, draft, num_blocks=128, block_size=4)
    assert decoder.generate(texts, GREEDY) == [continued(model, text, 24) for text in texts]
    depth = len(widths)
    assert decoder.record.passes == 2 * -(-24 // (depth + 1))
    assert draft.cache.manager.stats().used_blocks == 0


def test_alternatives_are_worth_having(model, other):
    """At the same depth, a tree of another model is accepted more often than its chain."""
    texts = [prompt(n, seed=n) for n in range(4, 12)]
    accepted = {}
    for widths in ((1, 1), (4, 4)):
        draft = ModelTreeDraft(other, widths, num_blocks=512, block_size=4)
        decoder = TreeDecoder(model, draft, num_blocks=512)
        assert decoder.generate(texts, GREEDY) == [continued(model, text, 24) for text in texts]
        accepted[widths] = decoder.record.tokens_per_pass
    assert 1 < accepted[1, 1] < accepted[4, 4]


@pytest.fixture(scope="module")
def exact(model):
    return joint(model, prompt(8), 3, WARM)


def drawn(model, draft, count=2000, batch=250):
    """Sequences of three tokens after one prompt, by seed 0 … count - 1."""
    decoder = TreeDecoder(model, draft, num_blocks=1200, block_size=8)
    sequences = []
    for first in range(0, count, batch):
        params = [
            SamplingParams(**{**vars(WARM), "seed": seed}) for seed in range(first, first + batch)
        ]
        sequences += map(tuple, decoder.generate([prompt(8)] * batch, params))
    assert decoder.manager.stats().used_blocks == 0
    return sequences, decoder.record


def test_a_wrong_distribution_is_told(model, other, exact):
    """The test of the tests below: samples of the draft are not taken for the target's."""
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    sequences, _ = drawn(other, Wild(max_nodes=1))
    assert surprise(sequences, exact) > 10 * FALSE_ALARM


def test_without_trees_samples_follow_the_model(model, exact):
    sequences, record = drawn(model, Wild(max_nodes=1))
    assert record.drafted == 0
    assert surprise(sequences, exact) < FALSE_ALARM


def test_with_random_trees_samples_follow_the_model(model, exact):
    draft = Wild(max_nodes=8, vocabulary=sorted({sequence[0] for sequence in exact}))
    sequences, record = drawn(model, draft)
    assert record.tokens_per_pass > 1.05
    assert surprise(sequences, exact) < FALSE_ALARM


@pytest.mark.parametrize("widths", [(1, 1), (3, 2), (2, 2, 2)])
def test_with_trees_of_another_model_samples_follow_the_model(model, other, exact, widths):
    draft = ModelTreeDraft(other, widths, num_blocks=8000, block_size=8)
    sequences, record = drawn(model, draft)
    assert record.tokens_per_pass > 1.3
    assert surprise(sequences, exact) < FALSE_ALARM
    assert draft.cache.manager.stats().used_blocks == 0


def test_with_n_grams_samples_follow_the_model(model):
    text = [*prompt(8)] * 2
    exact = joint(model, text, 3, WARM)
    decoder = TreeDecoder(model, NgramTreeDraft(3, 3), num_blocks=1200)
    params = [SamplingParams(**{**vars(WARM), "seed": seed}) for seed in range(250)]
    sequences = []
    for shift in range(0, 2000, 250):
        shifted = [SamplingParams(**{**vars(one), "seed": one.seed + shift}) for one in params]
        sequences += map(tuple, decoder.generate([text] * 250, shifted))
    assert decoder.record.drafted > 0
    assert surprise(sequences, exact) < FALSE_ALARM


def test_greedy_and_drawn_requests_go_together(model, other):
    texts = [prompt(6), prompt(9, seed=1)]
    warm = SamplingParams(max_new_tokens=20, temperature=0.9, seed=1, ignore_eos=True)
    draft = ModelTreeDraft(other, (2, 1), num_blocks=128)
    decoder = TreeDecoder(model, draft, num_blocks=64)
    first, second = decoder.generate(texts, [GREEDY, warm])
    assert first == continued(model, texts[0], 24)
    assert len(second) == 20


def test_stop_tokens_end_a_sequence_inside_a_path(model):
    text = prompt(9)
    whole = continued(model, text, 24)
    truth = {tuple(text[:4]): [*text, *whole]}
    for stop in set(whole):
        end = whole.index(stop) + 1
        decoder = TreeDecoder(model, Wild(truth), num_blocks=64)
        params = SamplingParams(max_new_tokens=24, stop_token_ids=(stop,), ignore_eos=True)
        assert decoder.generate([text], params) == [whole[:end]]
        assert decoder.manager.stats().used_blocks == 0


def test_end_tokens_of_the_model_end_a_sequence():
    model = sharp("llama")
    text = prompt(9)
    whole = continued(model, text, 24)
    model.generation_config.eos_token_id = whole[5]
    ended = whole[: whole.index(whole[5]) + 1]
    decoder = TreeDecoder(model, Wild(), num_blocks=64)
    assert decoder.generate([text], SamplingParams(max_new_tokens=24)) == [ended]
    assert decoder.generate([text], GREEDY) == [whole]


def test_trees_are_left_out_where_blocks_are_short(model):
    text = prompt(9)
    expected = continued(model, text, 24)
    draft = Wild({tuple(text[:4]): [*text, *expected]}, max_nodes=30)
    decoder = TreeDecoder(model, draft, num_blocks=9, block_size=4)
    assert decoder.generate([text], GREEDY) == [expected]  # 33 tokens of 36, trees of up to 35


def test_out_of_blocks_gives_everything_back(model):
    draft = Wild()
    decoder = TreeDecoder(model, draft, num_blocks=8, block_size=4)
    with pytest.raises(OutOfBlocksError):
        decoder.generate([prompt(9)] * 2, GREEDY)
    assert decoder.manager.stats().used_blocks == 0
    assert len(draft.released) == 2
    with pytest.raises(OutOfBlocksError):
        decoder.generate([prompt(9), prompt(60)], GREEDY)
    assert decoder.manager.stats().used_blocks == 0


def test_a_draft_out_of_blocks_proposes_what_it_can(model):
    texts = [prompt(9, seed=i) for i in range(3)]
    expected = [continued(model, text, 24) for text in texts]
    for blocks in (3, 5, 12, 30):
        draft = ModelTreeDraft(model, (2, 2), num_blocks=blocks, block_size=4)
        decoder = TreeDecoder(model, draft, num_blocks=256)
        assert decoder.generate(texts, GREEDY) == expected
        assert draft.cache.manager.stats().used_blocks == 0


def test_a_pass_that_fails_gives_everything_back(model):
    class FailingError(Exception):
        pass

    decoder = TreeDecoder(model, Wild(), num_blocks=64, block_size=4)
    forward, calls = decoder.runner.forward, 0

    def failing(*arguments):
        nonlocal calls
        calls += 1
        if calls > 4:
            raise FailingError
        return forward(*arguments)

    decoder.runner.forward = failing
    with pytest.raises(FailingError):
        decoder.generate([prompt(9), prompt(5)], GREEDY)
    assert decoder.manager.stats().used_blocks == 0
    decoder.runner.forward = forward
    assert decoder.generate([prompt(9)], GREEDY) == [continued(model, prompt(9), 24)]


def test_what_does_not_go_together_is_refused(model):
    small = sharp("llama")
    small.resize_token_embeddings(50)
    with pytest.raises(ValueError, match=r"vocabulary of 50 tokens, .* 61"):
        TreeDecoder(model, ModelTreeDraft(small, num_blocks=8), num_blocks=8)
    windowed = sharp("mistral")
    windowed.config.sliding_window = 6
    with pytest.raises(ValueError, match="window"):
        TreeDecoder(windowed, Wild(), num_blocks=8)
    decoder = TreeDecoder(model, Wild(), num_blocks=8)
    for wrong in ({"n": 2}, {"stop": ("a",)}, {"logprobs": True}):
        with pytest.raises(ValueError, match="not supported"):
            decoder.generate([prompt(3)], SamplingParams(**wrong))
    with pytest.raises(ValueError, match="2 prompts, but 1"):
        decoder.generate([prompt(3)] * 2, [GREEDY])
    with pytest.raises(ValueError, match="empty"):
        decoder.generate([[]], GREEDY)
    with pytest.raises(ValueError, match="vocabulary of 61"):
        decoder.generate([[61]], GREEDY)
    for widths in ((), (2, 0)):
        with pytest.raises(ValueError, match="widths"):
            ModelTreeDraft(model, widths, num_blocks=8)
    assert decoder.generate([], GREEDY) == []
