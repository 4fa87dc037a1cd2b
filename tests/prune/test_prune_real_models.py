"""A trained model: the order of the papers, and what tuning gains.

glassllm's English model of 0.85 M parameters, calibrated and judged on text that it wrote itself
(from different seeds), where its perplexity is its entropy. bench/quality.py does the same with
SmolLM2-135M and real text.
"""

import pytest
import torch

import pumice
from pumice.evaluate import perplexity
from test_real_models import glass


@pytest.fixture(scope="module")
def trained():
    """The model, calibration samples, and text to judge on."""
    pytest.importorskip("glassllm", reason="comes with the extra [test]")
    model, _ = glass()

    def write(seed, count):
        torch.manual_seed(seed)
        start = torch.randint(100, 1024, (count, 1))
        return model.generate(start, max_new_tokens=127, do_sample=True, top_k=0, pad_token_id=0)

    return model, list(write(1, 96).split(4)), write(2, 48).flatten()


def perplexities(trained, *recipes, **options):
    model, data, text = trained
    return [
        perplexity(pumice.compress(model, recipe, data, **options), text, context=128).perplexity
        for recipe in recipes
    ]


def test_magnitude_is_worse_than_wanda_and_that_than_sparsegpt(trained):
    model, _, text = trained
    dense = perplexity(model, text, context=128).perplexity
    magnitude, wanda, sparsegpt = perplexities(
        trained, pumice.Magnitude(0.7), pumice.Wanda(0.7), pumice.SparseGPT(0.7)
    )
    assert dense < sparsegpt < wanda < magnitude


def test_the_same_order_at_2_of_4_and_with_integers(trained):
    """341 inputs of down_proj are no multiple of 4."""
    pattern = {"pattern": "2:4"}
    magnitude, wanda, sparsegpt, joint = perplexities(
        trained,
        pumice.Magnitude(**pattern),
        pumice.Wanda(**pattern),
        pumice.SparseGPT(**pattern),
        pumice.SparseGPT(**pattern, bits=4, group_size=32, symmetric=False),
        exclude=("down_proj", "lm_head"),
    )
    assert sparsegpt < wanda < magnitude
    assert joint < wanda  # integers on top cost less than not making up for the zeros


def test_tuning_beats_one_shot_at_70_percent(trained):
    once, tuned = perplexities(
        trained,
        pumice.SparseGPT(0.7),
        pumice.PruneAndTune(0.7, rounds=2, steps=24, batch=2, learning_rate=1e-3),
    )
    assert tuned < 0.93 * once
