"""The demo of pruning: its verdict on made-up numbers, and all of it on a tiny model."""

import math

import pytest
import torch
import transformers

from demo import compare, pruning
from demo.results import Row
from pumice.evaluate import Perplexity
from tiny_llama import make_tokenizer

GOOD = {
    "magnitude50": 400.0, "wanda50": 50.0, "sparsegpt50": 47.0, "wanda24": 170.0,
    "sparsegpt24": 100.0,
}  # fmt: skip


def quality(perplexity, spread):
    """Of four windows; ``spread`` is that of nats among them."""
    mean = math.log(perplexity)
    nll = tuple(mean + sign * spread for sign in (-1, 1, -1, 1))
    return Perplexity(perplexity, mean, nll, 64, 63)


@pytest.mark.parametrize(
    ("change", "spread", "holds"),
    [
        ({}, 0.0, [True, True, True]),
        ({"wanda50": 140.0}, 0.0, [False, True, True]),
        ({"sparsegpt50": math.nan}, 0.0, [False, False, True]),
        ({"sparsegpt50": 51.0}, 0.0, [True, False, True]),
        ({}, 0.2, [True, False, True]),  # 6 % less, but ± 11 %
        ({"sparsegpt24": 171.0}, 0.0, [True, True, False]),
        ({"wanda24": math.nan}, 0.0, [True, True, False]),
    ],
)
def test_verdict(change, spread, holds):
    perplexities = {**GOOD, **change}
    rows = {
        method.name: Row(
            method,
            quality(
                perplexities.get(method.name, 22.0), spread if method is pruning.SPARSEGPT else 0.0
            ),
            1,
        )
        for method in pruning.METHODS
    }
    assert [ok for _, ok in pruning.verdict(rows)] == holds


def test_calibration_windows_are_spread_over_the_text():
    ids = torch.arange(105)
    windows = compare.spread(ids, 4, 10)
    assert [window.tolist()[0][0] for window in windows] == [0, 20, 50, 70]
    assert all(window.shape == (1, 10) for window in windows)
    assert compare.spread(ids, 0, 10) == []
    with pytest.raises(ValueError, match="105 tokens give 10 windows of 10, not 11"):
        compare.spread(ids, 11, 10)


def test_a_model_that_is_kept_is_of_the_very_same_setting():
    ids = torch.arange(640)
    digests = {
        method.digest(compare.spread(text, method.calibration, context))
        for method in pruning.METHODS[2:]  # those that are calibrated
        for text in (ids, ids + 1)
        for context in (32, 40)
    }
    fewer = pruning.WANDA.digest(compare.spread(ids, pruning.WINDOWS // 2, 32))
    assert len(digests | {fewer}) == 4 * len(pruning.METHODS[2:]) + 1
    again = pruning.WANDA.digest(compare.spread(ids.clone(), pruning.WINDOWS, 32))
    assert again in digests


def test_the_demo_from_end_to_end(monkeypatch, tmp_path, capsys):
    """A random model cannot be broken by pruning: the demo must say so and fail."""
    monkeypatch.setattr(compare, "load_model", lambda *_, **__: (_model(), make_tokenizer()))
    monkeypatch.setattr(compare, "load_text", lambda *_, **__: "Some text to read. " * 100)
    monkeypatch.setattr(
        pruning, "SIZES", {"context": 64, "windows": 2, "prefill": 32, "decode": 2, "rounds": 2}
    )
    assert pruning.main(["--out", str(tmp_path), "--windows", "2"]) == 1
    printed = capsys.readouterr().out
    assert all(method.label in printed for method in pruning.METHODS)
    assert "NO magnitude breaks the model" in " ".join(printed.split())


def _model():
    """Inputs in multiples of four, which those of tiny_llama are not."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()
