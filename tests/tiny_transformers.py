"""Tiny random models of transformers' families, one for each way that blocks are built."""

import pytest
import torch

COMMON = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(family):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    llama = {**COMMON, "intermediate_size": 112, "num_key_value_heads": 2}
    opt = {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 64}
    gpt2 = {"vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 4}
    makers = {
        "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**llama)),
        "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**llama)),
        "mistral": lambda t: t.MistralForCausalLM(t.MistralConfig(**llama)),
        "gemma": lambda t: t.GemmaForCausalLM(t.GemmaConfig(**llama, head_dim=16)),
        "opt": lambda t: t.OPTForCausalLM(t.OPTConfig(**opt)),
        "pythia": lambda t: t.GPTNeoXForCausalLM(
            t.GPTNeoXConfig(**COMMON, intermediate_size=96, max_position_embeddings=64)
        ),
        "gpt2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(**gpt2)),
    }
    model = makers[family](transformers).eval()
    with torch.no_grad():  # biases and gains start at 0 and 1, where mistakes do not show
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" in name:
                # Channels of different size, as in trained models.
                parameter.mul_(torch.linspace(1, 40, parameter.shape[1]))
    return model


def samples(count=4, tokens=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 61, (2, tokens), generator=generator) for _ in range(count)]
