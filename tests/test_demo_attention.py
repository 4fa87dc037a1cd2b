"""The examples of attention: small runs of both, and what they must notice."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LongformerConfig, LongformerModel

from demo import gpt_oss, longformer
from demo.longformer import WindowAttention, positions


def test_longformer_runs(capsys):
    arguments = ["--tokens", "1024", "--layers", "1", "--global-tokens", "3"]
    assert longformer.main(arguments) == 0
    assert "yes  the same hidden states" in capsys.readouterr().out


def test_gpt_oss_runs(capsys):
    """More tokens than the window, so that both kinds of layers show."""
    assert gpt_oss.main(["--tokens", "160", "--layers", "2", "--generate", "3"]) == 0
    assert capsys.readouterr().out.count("yes  the same") == 2


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (longformer, ["--tokens", "512", "--layers", "1"]),
        (gpt_oss, ["--tokens", "140", "--layers", "1", "--generate", "1"]),
    ],
)
def test_a_difference_fails(module, arguments, monkeypatch, capsys):
    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    assert module.main(arguments) == 1
    assert "NO " in capsys.readouterr().out


@torch.no_grad()
def test_longformer_of_padded_sequences_with_their_own_global_tokens():
    config = LongformerConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_window=8,
        max_position_embeddings=80,
    )
    torch.manual_seed(0)
    theirs = LongformerModel(config).eval()
    for parameter in theirs.parameters():
        if parameter.dim() > 1:
            parameter.mul_(5.0)
    ours = copy.deepcopy(theirs)
    for layer in ours.encoder.layer:
        layer.attention.self = WindowAttention(layer.attention.self)
    ids = torch.randint(2, 61, (3, 61))  # padded to a multiple of the window
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    chosen = torch.zeros_like(ids)
    chosen[0, [0, 17, 60]] = chosen[1, 3] = 1  # the third has none
    inputs = {"input_ids": ids, "attention_mask": mask, "global_attention_mask": chosen}
    real = mask.bool()
    torch.testing.assert_close(
        ours(**inputs).last_hidden_state[real],
        theirs(**inputs).last_hidden_state[real],
        rtol=1e-4,
        atol=1e-4,
    )


def test_positions():
    chosen = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    assert positions(chosen).tolist() == [[0, 3], [2, -1], [-1, -1]]
    assert positions(chosen).dtype == torch.int32
