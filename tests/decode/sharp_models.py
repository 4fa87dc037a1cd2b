"""Tiny models whose next token depends on everything: random ones hardly look at what came before,
and go on the same way whatever is wrong with the cache."""

import torch
from torch import nn

from tiny_transformers import build

ATTENTION = ("q_proj", "k_proj", "c_attn", "query_key_value")
OUTPUT = ("lm_head", "embed_out")
EMBEDDING = ("embed_tokens", "embed_in", "wte", "wpe")


def sharp(family: str, noise: float = 0.0) -> nn.Module:
    """Attention that picks a few tokens, and logits far apart. ``noise``: of every weight, as a
    part of its spread, for a model that often agrees with the one without."""
    model = build(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                continue
            if any(part in name for part in EMBEDDING):
                parameter.div_(parameter.std(unbiased=False))
            elif any(part in name for part in ATTENTION):
                parameter.mul_(10)
            elif any(part in name for part in OUTPUT):
                parameter.mul_(12)
            else:
                parameter.mul_(12)
            if noise:
                spread = parameter.std(unbiased=False)
                parameter.add_(noise * spread * torch.randn(parameter.shape, generator=generator))
    return model
