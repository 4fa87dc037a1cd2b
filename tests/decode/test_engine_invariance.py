"""The same bits in any company: batch_invariant, and models that cannot have it."""

from __future__ import annotations

import pytest
import torch
from engine_runs import (
    PROMPTS,
    engine_of,
    first_samples,
    greedy,
    logits_of,
)
from plain_models import PlainLm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batch_invariant_logits_have_the_same_bits_in_any_company(family, dtype):
    """Alone; in a batch; in pieces; computed again after a preemption; found in the cache."""
    pytest.importorskip("transformers")
    from tiny_transformers import build

    model = build(family).to(dtype)
    options = {"max_batch_tokens": 32, "max_sequences": 6, "batch_invariant": True}

    def tokens_and_logits(engine, prompts):
        seen = logits_of(engine)
        first = engine._ids
        tokens = first_samples(engine, prompts, greedy(14))
        return tokens, [
            {at: logits for (id, at), logits in seen.items() if id == first + i}
            for i in range(len(prompts))
        ]

    tight = engine_of(model, num_blocks=20, **options)
    tokens, logits = tokens_and_logits(tight, PROMPTS)
    assert tight.stats().preemptions > 0
    again_tokens, again_logits = tokens_and_logits(tight, PROMPTS[::-1])
    assert tight.stats().cache.prompt_hits > 0
    roomy = engine_of(model, **options)
    for i, prompt in enumerate(PROMPTS):
        alone, (alone_logits,) = tokens_and_logits(roomy, [prompt])
        assert alone == [tokens[i]] == [again_tokens[-1 - i]]
        assert alone_logits.keys() == logits[i].keys() == again_logits[-1 - i].keys()
        for at, expected in alone_logits.items():
            assert torch.equal(logits[i][at], expected)
            assert torch.equal(again_logits[-1 - i][at], expected)


class PlaceDependent(PlainLm):
    """Its logits are other ones at the end of a batch, as those of kernels with ragged edges."""

    def forward_paged(self, input_ids, positions, batch, rows):
        logits = super().forward_paged(input_ids, positions, batch, None)
        logits[-1] += 1e-6
        return logits if rows is None else logits[rows]


class CompanyDependent(PlainLm):
    """Its logits depend on the other tokens of the batch, as a mixture of experts' may."""

    def forward_paged(self, input_ids, positions, batch, rows):
        logits = super().forward_paged(input_ids, positions, batch, rows)
        return logits + 1e-5 * input_ids.unique().numel()


@pytest.mark.parametrize("kind", [PlaceDependent, CompanyDependent])
def test_models_that_are_not_batch_invariant_are_found_out(kind):
    engine_of(kind())
    with pytest.raises(RuntimeError, match=rf"batch_invariant: the logits of {kind.__name__}"):
        engine_of(kind(), batch_invariant=True)
