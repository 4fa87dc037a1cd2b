"""Requests and engines that are refused, and requests that are cancelled."""

from __future__ import annotations

import pytest
import torch
from engine_runs import (
    PROMPTS,
    VOCABULARY,
    assert_nothing_left,
    engine_of,
    first_samples,
    greedy,
    prompt_of,
    random_params,
)
from plain_models import PlainLm

from pumice.decode import Engine, UnknownRequestError


@pytest.fixture(scope="module")
def plain():
    return PlainLm()


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
