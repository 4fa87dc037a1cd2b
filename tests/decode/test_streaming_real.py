"""What the StreamingLLM paper found, on trained models and real text."""

from __future__ import annotations

import pytest
import torch

from pumice.decode.stream_perplexity import recomputed_perplexity, stream_perplexity
from pumice.integrations.models import load_model
from pumice.integrations.texts import load_text
from test_real_models import glass, needs_smollm2


@needs_smollm2
def test_the_first_tokens_hold_the_model_up():
    model, tokenizer = load_model("smollm2-135m")
    ids = torch.tensor(tokenizer(load_text("wikipedia")[:3000]).input_ids)[:256]
    dense = stream_perplexity(model, ids, window=None)
    window = stream_perplexity(model, ids, sinks=0, window=48)
    streamed = stream_perplexity(model, ids, sinks=4, window=44)
    # Until the first token leaves the cache all are the same.
    assert window.between(0, 49) == pytest.approx(dense.between(0, 49), rel=1e-4)
    assert streamed.between(0, 49) == pytest.approx(dense.between(0, 49), rel=1e-4)
    assert window.between(49, 256) > 1.5 * streamed.between(49, 256)
    # As good as what costs a window of work for every token.
    anew = recomputed_perplexity(model, ids, window=48, every=20)
    assert streamed.at(anew.places) < 1.25 * anew.perplexity


def test_many_times_the_trained_context():
    """glassllm was trained on 128 tokens. It is too weak to need its first tokens, but it does not
    know what to do with more than it was trained on."""
    model, _ = glass()
    _, tokenizer = pytest.importorskip("glassllm").load_pretrained("en")
    ids = torch.tensor(tokenizer.encode(load_text("pydoc")))[: 40 * 128]
    assert len(ids) == 40 * 128
    dense = stream_perplexity(model, ids, window=None)
    stream = stream_perplexity(model, ids, sinks=4, window=124)
    end = len(ids)
    assert dense.between(end // 2, end) > 1.2 * stream.between(end // 2, end)
    assert stream.cache_bytes < dense.cache_bytes / 10
