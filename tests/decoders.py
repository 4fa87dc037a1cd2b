"""Tiny random models of the families whose attention differs: what runs them must agree on all."""

from __future__ import annotations

import torch
import transformers

COMMON = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**COMMON, "intermediate_size": 56, "num_key_value_heads": 2, "pad_token_id": 0}
WINDOW = 6
# Sinks, a window in every other layer, experts.
GPT_OSS = {
    **GROUPED,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
DECODERS = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "mistral, window": ("Mistral", {**GROUPED, "sliding_window": WINDOW}),
    "gemma2, softcap": (
        "Gemma2",
        {**GROUPED, "head_dim": 16, "sliding_window": WINDOW, "attn_logit_softcapping": 0.5},
    ),
    "gpt-oss, sinks": ("GptOss", GPT_OSS),
    "gpt2": (
        "GPT2",
        {"vocab_size": 61, "n_embd": 48, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0},
    ),
    "pythia": ("GPTNeoX", {**COMMON, "intermediate_size": 56}),
}


def build(name):
    family, options = DECODERS[name]
    config_type = getattr(transformers, f"{family}Config")
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    dropouts = {key: 0.0 for key in ("resid_pdrop", "embd_pdrop") if family == "GPT2"}
    config = config_type(**options, **dropouts)
    torch.manual_seed(0)
    model = getattr(transformers, family + head)._from_config(config, attn_implementation="eager")
    return spread(model)


def spread(model):
    """Larger weights than the initial ones: sharp softmaxes, in which a wrong mask shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(1.0)
            elif parameter.dim() > 1:
                parameter.mul_(6.0)
    return model.eval()
