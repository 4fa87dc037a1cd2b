"""Continuous batching on tiny models: tokens as of transformers, whoever else is there."""

from __future__ import annotations

import pytest
import torch
from engine_runs import (
    VOCABULARY,
    assert_nothing_left,
    first_samples,
    greedy,
    logits_of,
    prompt_of,
    random_params,
    run,
)
from plain_models import PlainLm

from pumice.decode import Engine, SamplingParams, UnknownRequestError

PROMPTS = [prompt_of(n, seed=n) for n in (1, 2, 7, 19, 30, 4, 11, 3)]


@pytest.fixture(scope="module")
def plain():
    return PlainLm()


def engine_of(model, **options):
    return Engine(model, **{"num_blocks": 200, "block_size": 4, **options})


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


# Ends.


def outputs_of(engine, prompt, params):
    engine.add(prompt, params)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert_nothing_left(engine)
    return outputs


def test_the_end_by_length(plain):
    outputs = outputs_of(engine_of(plain), PROMPTS[2], greedy(5))
    assert [len(output.tokens) for output in outputs] == [1] * 5
    assert [output.finish_reason for output in outputs] == [None] * 4 + ["length"]
    assert [output.finished for output in outputs] == [False] * 4 + [True]
    assert all(output.text is output.logprobs is output.stop is None for output in outputs)


def test_the_end_by_tokens(plain):
    (tokens,) = first_samples(engine_of(plain), [PROMPTS[3]], greedy(30))
    new = next(i for i in range(5, 30) if tokens[i] not in tokens[:i])
    for params, stop in (
        (greedy(30, stop_token_ids=[tokens[new]]), tokens[new]),
        (greedy(30, stop=[tokens[new - 1 : new + 1]]), tuple(tokens[new - 1 : new + 1])),
        (greedy(30, stop=[[60] * 40, tokens[: new + 1]]), tuple(tokens[: new + 1])),
    ):
        outputs = outputs_of(engine_of(plain), PROMPTS[3], params)
        assert [output.tokens[0] for output in outputs] == tokens[: new + 1]
        assert (outputs[-1].finish_reason, outputs[-1].stop) == ("stop", stop)
    # The prompt's tokens are no part of it.
    across = greedy(30, stop=[[PROMPTS[3][-1], tokens[0]]])
    assert first_samples(engine_of(plain), [PROMPTS[3]], across) == [tokens]


def test_the_end_by_the_models_own_tokens():
    pytest.importorskip("transformers")
    from tiny_transformers import build

    model = build("llama")
    (tokens,) = first_samples(engine_of(model), [PROMPTS[3]], greedy(30))
    last = next(i for i in range(3, 30) if tokens[i] not in tokens[:i])
    for eos in (tokens[last], [60, tokens[last]]):
        model.generation_config.eos_token_id = eos
        engine = engine_of(model)
        assert first_samples(engine, [PROMPTS[3]], SamplingParams(30)) == [tokens[: last + 1]]
        assert first_samples(engine, [PROMPTS[3]], greedy(30)) == [tokens]


def test_logprobs_are_of_the_models_own_distribution(plain):
    params = [random_params(9, 1, top_k=5, logprobs=True), greedy(9), greedy(9, logprobs=True)]
    engine = engine_of(plain)
    ids = [engine.add(PROMPTS[4], one) for one in params]
    tokens = {id: [] for id in ids}
    logprobs = {id: [] for id in ids}
    while engine.has_work:
        for output in engine.step():
            tokens[output.id] += output.tokens
            logprobs[output.id].append(output.logprobs)
    assert logprobs[ids[1]] == [None] * 9
    for id in (ids[0], ids[2]):
        scores = plain.alone(PROMPTS[4] + tokens[id])[len(PROMPTS[4]) - 1 : -1].log_softmax(-1)
        expected = scores.gather(1, torch.tensor(tokens[id])[:, None])[:, 0]
        found = torch.tensor(logprobs[id])[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# The same bits in any company.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batch_invariant_logits_have_the_same_bits_in_any_company(family, dtype):
    """Alone; in a batch; in pieces; computed again after a preemption; found in the cache."""
    pytest.importorskip("transformers")
    from tiny_transformers import build

    model = build(family).to(dtype)
    options = {"max_batch_tokens": 32, "max_sequences": 6, "batch_invariant": True}

    def tokens_and_logits(engine, prompts):
        seen = logits_of(engine)
        first = engine._ids
        tokens = first_samples(engine, prompts, greedy(14))
        return tokens, [
            {at: logits for (id, at), logits in seen.items() if id == first + i}
            for i in range(len(prompts))
        ]

    tight = engine_of(model, num_blocks=20, **options)
    tokens, logits = tokens_and_logits(tight, PROMPTS)
    assert tight.stats().preemptions > 0
    again_tokens, again_logits = tokens_and_logits(tight, PROMPTS[::-1])
    assert tight.stats().cache.prompt_hits > 0
    roomy = engine_of(model, **options)
    for i, prompt in enumerate(PROMPTS):
        alone, (alone_logits,) = tokens_and_logits(roomy, [prompt])
        assert alone == [tokens[i]] == [again_tokens[-1 - i]]
        assert alone_logits.keys() == logits[i].keys() == again_logits[-1 - i].keys()
        for at, expected in alone_logits.items():
            assert torch.equal(logits[i][at], expected)
            assert torch.equal(again_logits[-1 - i][at], expected)


class PlaceDependent(PlainLm):
    """Its logits are other ones at the end of a batch, as those of kernels with ragged edges."""

    def forward_paged(self, input_ids, positions, batch, rows):
        logits = super().forward_paged(input_ids, positions, batch, None)
        logits[-1] += 1e-6
        return logits if rows is None else logits[rows]


class CompanyDependent(PlainLm):
    """Its logits depend on the other tokens of the batch, as a mixture of experts' may."""

    def forward_paged(self, input_ids, positions, batch, rows):
        logits = super().forward_paged(input_ids, positions, batch, rows)
        return logits + 1e-5 * input_ids.unique().numel()


@pytest.mark.parametrize("kind", [PlaceDependent, CompanyDependent])
def test_models_that_are_not_batch_invariant_are_found_out(kind):
    engine_of(kind())
    with pytest.raises(RuntimeError, match=rf"batch_invariant: the logits of {kind.__name__}"):
        engine_of(kind(), batch_invariant=True)


# What can go wrong.


def test_bad_requests_are_refused_and_change_nothing(plain):
    engine = engine_of(plain, num_blocks=10, max_length=50)
    engine.add(PROMPTS[2], greedy(4))
    for prompt, params, error, message in (
        ([], greedy(), ValueError, "prompt is empty"),
        ([VOCABULARY], greedy(), ValueError, "token 61 at position 0"),
        ([1.5], greedy(), TypeError, "integer token ids"),
        (torch.tensor([[1, 2]]), greedy(), TypeError, r"of shape \[1, 2\]"),
        (prompt_of(36), greedy(6), ValueError, "need room for 41 tokens, but the cache has 40"),
        ([1], greedy(50), ValueError, "make 51 tokens, but the model takes 50"),
        ([1], greedy(4, n=65), ValueError, "n = 65 samples are more than max_sequences"),
        ([1], greedy(4, stop=["end"]), ValueError, "the engine needs a tokenizer"),
    ):
        with pytest.raises(error, match=message):
            engine.add(prompt, params)
    assert engine.stats().waiting == 1
    while engine.has_work:
        engine.step()
    assert_nothing_left(engine)


def test_positions_that_the_model_lacks_are_refused():
    pytest.importorskip("transformers")
    from tiny_transformers import build

    engine = engine_of(build("pythia"))
    with pytest.raises(ValueError, match=r"make 65 tokens, but the model takes 64"):
        engine.add(prompt_of(30), greedy(35))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 4, "cache_bytes": 4}, "either num_blocks or cache_bytes"),
        ({"num_blocks": None, "cache_bytes": 4}, "less than one block of"),
        ({"max_sequences": 9, "max_batch_tokens": 8}, "max_sequences must be in"),
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
    ],
)
def test_impossible_engines_are_refused(plain, options, message):
    with pytest.raises(ValueError, match=message):
        engine_of(plain, **options)


def test_cache_bytes_are_an_upper_limit(plain):
    engine = Engine(plain, cache_bytes=100_000)
    assert 0 <= 100_000 - engine.runner.pool.nbytes < engine.runner.pool.nbytes / 10


def test_cancelling_gives_blocks_back_and_leaves_the_others(plain):
    engine = engine_of(plain)
    expected = first_samples(engine, PROMPTS[3:5], greedy(12))
    kept = engine.add(PROMPTS[3], greedy(12))
    running = engine.add(PROMPTS[4], random_params(12, n=3))
    engine.step()
    engine.step()
    waiting = engine.add(PROMPTS[4], greedy(12))
    engine.cancel(running)
    engine.cancel(waiting)
    tokens = []
    while engine.has_work:
        for output in engine.step():
            assert output.id == kept
            tokens += output.tokens
    assert tokens == expected[0][-len(tokens) :]
    assert_nothing_left(engine)


def test_cancelling_what_is_not_there_is_an_error(plain):
    engine = engine_of(plain)
    id = engine.add(PROMPTS[1], greedy(2))
    engine.cancel(id)
    with pytest.raises(UnknownRequestError, match="ended already, or was cancelled before"):
        engine.cancel(id)
    ended = engine.add(PROMPTS[1], greedy(1))
    engine.step()
    with pytest.raises(UnknownRequestError, match="ended already"):
        engine.cancel(ended)
    with pytest.raises(UnknownRequestError, match="there is no request 7"):
        engine.cancel(7)


def test_a_closed_engine_does_nothing_more(plain):
    with engine_of(plain) as engine:
        engine.add(PROMPTS[4], greedy())
        engine.step()
    assert_nothing_left(engine)
    for call in (engine.step, lambda: engine.add(PROMPTS[0])):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            call()
    engine.close()


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
