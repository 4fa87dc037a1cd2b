"""Models whose rotary frequencies depend on the length of the text: no request changes another."""

from __future__ import annotations

import pytest
import torch
from engine_runs import engine_of, first_samples, greedy, prompt_of
from streaming_cases import GROWING, of_family, rope

from pumice.decode.model import PagedModel
from pumice.decode.rotary import steady_length

PROMPTS = [prompt_of(n, seed=n) for n in (60, 4, 20, 31, 9)]
TRAINED, LONGEST = 32, 100


@torch.no_grad()
def last_logits(model, tokens, longest):
    """After all of the text in one pass, with the frequencies of ``longest`` tokens."""
    positions = [*range(len(tokens)), longest - 1]
    logits = model(torch.tensor([[*tokens, 0]]), position_ids=torch.tensor([positions])).logits
    return logits[0, len(tokens) - 1]


def continued(model, tokens, count, longest):
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(last_logits(model, tokens, longest).argmax()))
    return tokens[-count:]


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True, "max_batch_tokens": 32}])
@pytest.mark.parametrize("name", GROWING)
def test_all_requests_have_the_frequencies_of_the_longest(name, options):
    model = GROWING[name]()
    expected = [continued(model, text, 20, LONGEST) for text in PROMPTS]
    # One less: transformers forgets a longer text at shorter ones than it was trained on.
    short, long = (last_logits(model, PROMPTS[2], n) for n in (TRAINED - 1, LONGEST))
    assert not torch.allclose(short, long, rtol=1e-3, atol=1e-3)
    engine = engine_of(model, max_length=LONGEST, **options)
    assert first_samples(engine, PROMPTS, greedy(20), gap=2) == expected
    tight = engine_of(model, max_length=LONGEST, num_blocks=30)
    assert first_samples(tight, PROMPTS, greedy(20)) == expected
    assert tight.stats().preemptions > 0


def test_a_limit_that_nobody_asked_for_is_that_of_short_texts():
    model = GROWING["longrope"]()
    model.config.max_position_embeddings = LONGEST
    engine = engine_of(model)
    assert engine.max_length == TRAINED
    prompts = [text[:12] for text in PROMPTS]
    expected = [continued(model, text, 20, TRAINED) for text in prompts]
    assert first_samples(engine, prompts, greedy(20)) == expected
    with pytest.raises(ValueError, match=r"make 33 tokens, but the model takes 32 \(max_length\)"):
        engine.add(PROMPTS[0][:12], greedy(21))


@pytest.mark.parametrize("kind", ["default", "linear", "yarn"])
def test_frequencies_that_are_fixed_limit_nothing(kind, monkeypatch):
    model = of_family("Llama", **(rope(kind, factor=2.0) if kind != "default" else {}))
    monkeypatch.setattr("pumice.decode.rotary.look", None)  # and nothing is run to find that out
    assert steady_length(PagedModel(model), 10**6) == 10**6


@pytest.mark.parametrize("name", GROWING)
def test_the_length_is_found_from_any_limit(name):
    model = PagedModel(GROWING[name]())
    assert [steady_length(model, most) for most in (1, 31, 32, 33, 5000)] == [1, 31, 32, 32, 32]
