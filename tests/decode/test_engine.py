"""Continuous batching on tiny models: tokens as of transformers, whoever else is there."""

from __future__ import annotations

import pytest
import torch
from engine_runs import (
    PROMPTS,
    VOCABULARY,
    engine_of,
    first_samples,
    greedy,
    prompt_of,
    random_params,
    run,
)
from plain_models import PlainLm

from pumice.decode import SamplingParams


@pytest.fixture(scope="module")
def plain():
    return PlainLm()


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma", "opt", "pythia", "gpt2"])
def test_greedy_tokens_are_those_of_transformers(family):
    pytest.importorskip("transformers")
    from tiny_transformers import build

    model = build(family)
    expected = [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]  # fmt: skip
    roomy = engine_of(model)
    assert first_samples(roomy, PROMPTS, greedy(16), gap=2) == expected
    # In pieces of prompts, out of blocks, computed again.
    tight = engine_of(model, num_blocks=14, max_batch_tokens=10, max_sequences=5)
    assert first_samples(tight, PROMPTS, greedy(16)) == expected
    assert tight.stats().preemptions > 0


def test_a_plain_model_gives_what_its_logits_say(plain):
    tokens = first_samples(engine_of(plain), PROMPTS, greedy(10))
    for prompt, found in zip(PROMPTS, tokens, strict=True):
        logits = plain.alone(prompt + found[:-1])
        assert found == logits[len(prompt) - 1 :].argmax(-1).tolist()


def test_requests_come_and_go_at_any_step(plain):
    params = [greedy(3 + 5 * i % 17) for i in range(len(PROMPTS))]
    together = first_samples(engine_of(plain), PROMPTS, params, gap=3)
    for prompt, one, found in zip(PROMPTS, params, together, strict=True):
        assert first_samples(engine_of(plain), [prompt], one) == [found]


def test_samples_depend_on_the_seed_and_not_on_the_company(plain):
    params = [random_params(20, seed=100 + i) for i in range(len(PROMPTS))]
    together = first_samples(
        engine_of(plain, num_blocks=22, max_batch_tokens=16, max_sequences=8), PROMPTS, params
    )
    for prompt, one, found in zip(PROMPTS, params, together, strict=True):
        assert first_samples(engine_of(plain), [prompt], one) == [found]
    other = [random_params(20, seed=200 + i) for i in range(len(PROMPTS))]
    assert first_samples(engine_of(plain), PROMPTS, other) != together


def test_a_seed_that_was_drawn_is_reported_and_gives_the_same_again(plain):
    engine = engine_of(plain)
    torch.manual_seed(5)
    engine.add(PROMPTS[2], SamplingParams(12, temperature=1.0, ignore_eos=True))
    outputs = [output for _ in range(12) for output in engine.step()]
    (seed,) = {output.seed for output in outputs}
    tokens = [token for output in outputs for token in output.tokens]
    assert first_samples(engine, [PROMPTS[2]], random_params(12, seed)) == [tokens]
    engine.add(PROMPTS[2], SamplingParams(1, temperature=1.0))
    torch.manual_seed(5)
    engine.add(PROMPTS[2], SamplingParams(1, temperature=1.0))
    first, second = engine.step()
    assert first.seed != second.seed == seed


def test_parallel_samples_are_those_of_requests_of_their_own(plain):
    engine = engine_of(plain)
    (samples,) = run(engine, [PROMPTS[3]], random_params(10, seed=40, n=4))
    assert sorted(samples) == [0, 1, 2, 3]
    for index, found in samples.items():
        assert first_samples(engine_of(plain), [PROMPTS[3]], random_params(10, 40 + index)) == [
            found
        ]
    assert len({tuple(found) for found in samples.values()}) > 1
    assert engine.stats().computed_tokens == len(PROMPTS[3]) + 4 * 9  # the prompt once


def test_parallel_samples_under_preemption(plain):
    params = [random_params(14, seed=10 * i, n=3) for i in range(4)]
    prompts = PROMPTS[2:6]
    tight = engine_of(plain, num_blocks=24, max_batch_tokens=16, max_sequences=9)
    found = run(tight, prompts, params)
    assert tight.stats().preemptions > 0
    assert found == run(engine_of(plain), prompts, params)


def test_parameters_of_each_request_are_its_own(plain):
    prompts = [PROMPTS[4]] * 6
    params = [
        greedy(8),
        random_params(8, 3),
        random_params(8, 3, top_k=1),
        random_params(8, 3, top_p=1e-6),
        random_params(8, 3, min_p=1.0),
        random_params(8, 3, top_k=3, top_p=0.9),
    ]
    found = first_samples(engine_of(plain), prompts, params)
    assert found[0] == found[2] == found[3] == found[4] != found[1]
    alone = [first_samples(engine_of(plain), [PROMPTS[4]], one)[0] for one in params]
    assert found == alone


def test_a_known_prompt_is_not_computed_again(plain):
    engine = engine_of(plain)
    expected = first_samples(engine, [PROMPTS[4]], greedy(6))
    before = engine.stats()
    assert first_samples(engine, [PROMPTS[4]], greedy(6)) == expected
    after = engine.stats()
    assert after.cache.prompt_hits - before.cache.prompt_hits == 28
    assert after.computed_tokens - before.computed_tokens == 2 + 5
    without = engine_of(plain, prefix_cache=False)
    for _ in range(2):
        assert first_samples(without, [PROMPTS[4]], greedy(6)) == expected
    assert without.stats().cache.prompt_hits == 0


@pytest.mark.parametrize("family", ["plain", "llama", "mistral, window"])
def test_equal_prompts_that_come_together_are_computed_once(family, plain):
    model = plain
    if family != "plain":
        model = pytest.importorskip("decoders").build(family)
    expected = first_samples(engine_of(model, prefix_cache=False), [PROMPTS[4]], greedy(6))
    engine = engine_of(model)
    prompts = [PROMPTS[4]] * 4 + [[*PROMPTS[4], 5, 6]]
    found = first_samples(engine, prompts, greedy(6))
    assert found[:4] == expected * 4
    assert found[4:] == first_samples(engine_of(model), prompts[4:], greedy(6))
    stats = engine.stats()
    assert stats.cache.prompt_hits == 4 * 28
    assert stats.computed_tokens == 30 + 3 * 2 + 4 + 5 * 5
    assert stats.passes == 6


def test_an_engine_without_work_steps_in_vain(plain):
    assert engine_of(plain).step() == []


def test_the_account_adds_up(plain):
    engine = engine_of(plain, prefix_cache=False)
    run(engine, PROMPTS, greedy(5))
    stats = engine.stats()
    assert stats.generated_tokens == 5 * len(PROMPTS)
    assert stats.computed_tokens == sum(len(p) + 4 for p in PROMPTS)
    assert stats.passes == 5
    assert (stats.running, stats.waiting, stats.failed_passes, stats.drafted) == (0, 0, 0, 0)


def test_a_long_prompt_does_not_hold_up_those_that_generate(plain):
    engine = engine_of(plain, max_batch_tokens=8, max_sequences=4)
    short = engine.add([1, 2], greedy(40))
    engine.step()
    engine.add(prompt_of(60), greedy(2))
    for _ in range(9):
        assert [output.id for output in engine.step()][:1] == [short]


def test_windowed_models_keep_only_what_is_seen():
    pytest.importorskip("transformers")
    import transformers

    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, sliding_window=9,
        )
    ).eval()  # fmt: skip
    engine = engine_of(model)
    prompt = prompt_of(25)
    engine.add(prompt, greedy(30))
    most, tokens = 0, []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.tokens]
        most = max(most, engine.stats().cache.used_blocks if tokens[1:] else 0)
    assert most <= 4
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert tokens == expected[0, 25:].tolist()


def test_a_pool_of_bytes_serves_too(plain):
    close = first_samples(engine_of(plain, cache_dtype=torch.int8), PROMPTS, greedy(3))
    exact = first_samples(engine_of(plain), PROMPTS, greedy(3))
    assert sum(a[0] == b[0] for a, b in zip(close, exact, strict=True)) >= 6
