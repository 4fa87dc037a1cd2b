"""Models for the tests of streaming, streams of them, and what the paper's form of it gives."""

from __future__ import annotations

import copy

import torch
import transformers
from forward_passes import poison, prompts
from streaming_reference import PaperStream

from decoders import GROUPED, spread
from pumice.decode.streaming import StreamingModel

TOKENS = prompts(90, seed=0)[0]


def of_family(name, config="", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{config or name}Config")(**{**GROUPED, **options})
    return spread(
        getattr(transformers, f"{name}ForCausalLM")._from_config(
            config, attn_implementation="eager"
        )
    )


def rope(kind, **options):
    parameters = {"rope_type": kind, "rope_theta": 1000.0, **options}
    if transformers.__version__.startswith("4"):
        return {"rope_scaling": parameters}
    return {"rope_parameters": parameters}


def stream_of(model, sinks, window, block_size=4, chunk=7, **options):
    stream = StreamingModel(
        model, sinks=sinks, window=window, block_size=block_size, chunk=chunk, **options
    )
    poison(stream.pool)
    return stream


def of_the_paper(model, sinks, window, tokens, interleaved=False, frequencies=None):
    """The logits of tokens; ``frequencies``: for each layer, or the model's only ones."""
    if frequencies is None:
        frequencies = next(b for n, b in model.named_buffers() if n.endswith("inv_freq"))
    # torch multiplies gpt-oss's experts in 32 bits at most.
    exact = (
        model
        if isinstance(model, transformers.GptOssForCausalLM)
        else copy.deepcopy(model).double()
    )
    stream = PaperStream(exact, sinks, window, inv_freq=frequencies, interleaved=interleaved)
    return torch.stack([stream.step(token) for token in tokens])


def assert_close(ours, theirs, tolerance=2e-5):
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


# Frequencies that depend on the length of the text. The models were trained on 32 tokens.


def dynamic():
    # For dynamic scaling the length that was trained on is the one that is said to be the most.
    return of_family("Llama", **rope("dynamic", factor=2.0), max_position_embeddings=32)


def longrope():
    factors = {
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    }
    parameters = rope("longrope", factor=2.0, original_max_position_embeddings=32, **factors)
    # Version 4 looks for it beside the parameters.
    return of_family("Llama", **parameters, original_max_position_embeddings=32)


GROWING = {"dynamic": dynamic, "longrope": longrope}
