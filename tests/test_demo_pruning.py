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


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, [True, True]),
        ({"wanda50": 140.0}, [False, True]),
        ({"sparsegpt50": math.nan}, [False, True]),
        ({"sparsegpt24": 171.0}, [True, False]),
        ({"wanda24": math.nan}, [True, False]),
    ],
)
def test_verdict(change, holds):
    rows = {
        method.name: Row(
            method, Perplexity({**GOOD, **change}.get(method.name, 22.0), 0.0, (0.0,), 64, 63), 1
        )
        for method in pruning.METHODS
    }
    assert [ok for _, ok in pruning.verdict(rows)] == holds


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
