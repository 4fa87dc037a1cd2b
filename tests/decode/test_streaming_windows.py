"""Streams of models with windows of their own, and with frequencies that depend on the length."""

from __future__ import annotations

import pytest
import torch
import transformers
from forward_passes import alone, prompts
from streaming_cases import (
    GROWING,
    TOKENS,
    assert_close,
    of_family,
    of_the_paper,
    stream_of,
)

from decoders import WINDOW, build
from pumice.decode import rotary
from pumice.decode.model import PagedModel

# sinks, window, block_size, chunk around layers that look back WINDOW = 6 tokens: they see nothing
# of the sinks, all of them, or some.
SHAPES = [
    (4, 12, 4, 7),
    (4, 2, 4, 9),
    (1, 5, 16, 1),
    (4, 3, 2, 9),
    (4, 5, 3, 33),
    (0, 9, 4, 5),
]
OF_TWO_ROPES = {"head_dim": 16, "sliding_window": WINDOW}


def gemma3():
    """Two rotary embeddings: layers with a window turn faster."""
    layers = ["sliding_attention", "full_attention"]
    if transformers.__version__.startswith("4"):
        ropes = {"rope_theta": 10_000.0, "rope_local_base_freq": 100.0}
    else:
        ropes = {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            }
        }
    return of_family("Gemma3", "Gemma3Text", **OF_TWO_ROPES, **ropes, layer_types=layers)


def frequencies_of_gemma3(dim=16):
    pairs = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)
    return [(1 / base**pairs).float() for base in (100.0, 10_000.0)]


FAMILIES = {
    "mistral": (lambda: build("mistral, window"), None),
    "gemma2": (lambda: build("gemma2, softcap"), None),
    "gemma3": (gemma3, frequencies_of_gemma3()),
    "gpt-oss": (lambda: build("gpt-oss, sinks"), None),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_windows_count_places_in_the_cache(name, shape):
    make, frequencies = FAMILIES[name]
    model = make()
    stream = stream_of(model, *shape)
    ours = [stream.forward(TOKENS[a:b]) for a, b in ((0, 50), (50, 53), (53, 54), (54, 90))]
    expected = of_the_paper(model, *shape[:2], TOKENS, frequencies=frequencies)
    assert_close(torch.cat(ours), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_as_long_as_everything_fits_it_is_dense(name):
    model = FAMILIES[name][0]()
    expected = alone(model, TOKENS)
    assert_close(stream_of(model, 4, 86).forward(TOKENS), expected)
    part = stream_of(model, 4, 30).forward(TOKENS)
    assert_close(part[:34], expected[:34])


def test_where_all_layers_have_windows_a_stream_is_dense_for_ever():
    """What they were trained to do without is not brought back by sinks."""
    model = build("mistral, window")
    assert_close(stream_of(model, 4, 12).forward(TOKENS), alone(model, TOKENS))
    # But a stream may be narrower than they are, and then has sinks.
    narrow = stream_of(model, 2, 4).forward(TOKENS)
    assert not torch.allclose(narrow, alone(model, TOKENS), rtol=1e-3, atol=1e-3)


def test_a_learned_sink_counts_once():
    """Of two attentions that are merged one has it; with both it would weigh double."""
    model = of_family("GptOss", head_dim=16, num_local_experts=4, num_experts_per_tok=2,
                      layer_types=["full_attention"] * 2)  # fmt: skip
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(3.0)
    assert_close(stream_of(model, 4, 12).forward(TOKENS), of_the_paper(model, 4, 12, TOKENS))


# Frequencies that depend on the length of the text.


def frequencies_at(model, length):
    """What transformers sets for a text of that length."""
    model.model.rotary_emb(torch.zeros(1), torch.tensor([[0]]))
    model.model.rotary_emb(torch.zeros(1), torch.tensor([[length - 1]]))
    return model.model.rotary_emb.inv_freq.clone()


@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (4, 28), (4, 29), (3, 61), (0, 40)])
@pytest.mark.parametrize("name", GROWING)
def test_frequencies_are_those_of_a_text_as_long_as_the_cache(name, sinks, window):
    model = GROWING[name]()
    short, there = frequencies_at(model, 1), frequencies_at(model, sinks + window)
    assert torch.equal(short, there) == (sinks + window <= 32)
    out = stream_of(model, sinks, window).forward(TOKENS)
    # One pass over as many tokens, and after that the paper's form.
    dense = alone(model, TOKENS[: sinks + window])
    assert_close(out[: sinks + window], dense)
    assert_close(out, of_the_paper(model, sinks, window, TOKENS, frequencies=there))


@pytest.mark.parametrize("name", GROWING)
def test_a_longer_text_before_leaves_no_trace(name):
    model = GROWING[name]()
    expected = stream_of(model, 4, 31).forward(TOKENS)
    alone(model, TOKENS)
    stream = stream_of(model, 4, 31)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    alone(model, TOKENS[:50])
    assert_close(stream.forward(TOKENS), expected)
    assert torch.equal(frequencies, frequencies_at(model, 1))


def test_two_rotary_embeddings_are_told_apart():
    found = rotary.find_rotary(PagedModel(gemma3()), 16)
    for ours, theirs in zip(found, frequencies_of_gemma3(), strict=True):
        torch.testing.assert_close(ours.inv_freq, theirs.double(), rtol=1e-6, atol=0)


def test_memory_does_not_grow():
    stream = stream_of(build("gpt-oss, sinks"), 4, 20, block_size=4, chunk=6)
    blocks = 1 + (20 + 6 - 2) // 4 + 2
    assert stream.pool.num_blocks == blocks
    for piece in prompts(*[6, 1, 3, 11, 6] * 20):
        assert stream.forward(piece).isfinite().all()
