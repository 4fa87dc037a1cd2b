"""When a request ends, and what is reported of its tokens."""

from __future__ import annotations

import pytest
import torch
from engine_runs import (
    PROMPTS,
    assert_nothing_left,
    engine_of,
    first_samples,
    greedy,
    random_params,
)
from plain_models import PlainLm

from pumice.decode import SamplingParams


@pytest.fixture(scope="module")
def plain():
    return PlainLm()


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
