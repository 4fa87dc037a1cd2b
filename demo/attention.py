"""The uncompressed model on pumice's attention: the same tokens and perplexity, and its speed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pumice.integrations.transformers  # noqa: F401  registers attn_implementation="pumice"
from demo.compare import Setting
from demo.results import Row
from pumice.evaluate import perplexity, throughput

PROMPT, TOKENS = 64, 24
ROUNDS = 2


def line(setting: Setting, base: Row) -> str:
    """One line of text; the model's own attention is in place again afterwards."""
    model: Any = setting.model
    ids = setting.evaluation
    prompt = ids[None, :PROMPT]
    before = model.config._attn_implementation
    tokens = generate(model, prompt)
    model.set_attn_implementation("pumice")
    try:
        same = torch.equal(generate(model, prompt), tokens)
        quality = perplexity(model, ids, context=setting.context, windows=setting.windows)
        first = base.rounds[0]
        speed = throughput(
            model,
            ids,
            prefill=first.prefill_tokens,
            decode=first.decode_tokens,
            repeats=ROUNDS,
            warmup=0,
        )
    finally:
        model.set_attn_implementation(before)
    return (
        f'attn_implementation="pumice" in place of "{before}": '
        f"{'the same' if same else 'NOT the same'} {TOKENS} tokens, perplexity "
        f"{quality.perplexity:.4f} ({base.quality.perplexity:.4f}), prefill {speed.prefill:.0f}/s "
        f"({base.prefill:.0f}), decode {speed.decode:.1f}/s ({base.decode:.1f})"
    )


@torch.inference_mode()
def generate(model: nn.Module, prompt: Tensor) -> Tensor:
    """The tokens that follow, greedily."""
    output = model(prompt, use_cache=True)
    tokens = [output.logits[:, -1:].argmax(-1)]
    while len(tokens) < TOKENS:
        output = model(tokens[-1], past_key_values=output.past_key_values, use_cache=True)
        tokens.append(output.logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1)
