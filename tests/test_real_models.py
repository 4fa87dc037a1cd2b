"""Trained models and real text: what the methods are for.

glassllm is small enough for every run and comes with the extra [test]. SmolLM2-135M (93 MB) runs
where it has been fetched before (``make demo`` does), or where PUMICE_NETWORK_TESTS=1 allows it.
"""

import copy
import os
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import pumice
import pumice.integrations.transformers
from pumice.evaluate import Perplexity, perplexity
from pumice.integrations._packages import cache_dir
from pumice.integrations.models import load_model
from pumice.integrations.texts import load_text

NAIVE = pumice.Int8(activations="per_tensor", weights="per_tensor")

fetched = all((cache_dir() / n).is_dir() for n in ("smollm2-135m-1", "wikipedia-excerpt-1"))
needs_smollm2 = pytest.mark.skipif(
    not (fetched or os.environ.get("PUMICE_NETWORK_TESTS") == "1"),
    reason="SmolLM2-135M is not in the cache; PUMICE_NETWORK_TESTS=1 fetches it",
)


def glass() -> tuple[nn.Module, Any]:
    """glassllm's English model, 0.85 M trained parameters, as a transformers one and its own.

    Odd shapes: 341 inner features, two query heads for each key head.
    """
    glassllm = pytest.importorskip("glassllm", reason="comes with the extra [test]")
    original, _ = glassllm.load_pretrained("en")
    cfg = original.cfg
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        intermediate_size=int(8 * cfg.d_model / 3),
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_kv_heads,
        max_position_embeddings=cfg.max_len,
        rms_norm_eps=cfg.eps,
        tie_word_embeddings=True,
    )
    names = {
        "norm1.gamma": "input_layernorm.weight",
        "norm2.gamma": "post_attention_layernorm.weight",
        "attn.W_Q": "self_attn.q_proj.weight",
        "attn.W_K": "self_attn.k_proj.weight",
        "attn.W_V": "self_attn.v_proj.weight",
        "attn.W_O": "self_attn.o_proj.weight",
        "ffn.W1": "mlp.gate_proj.weight",
        "ffn.W3": "mlp.up_proj.weight",
        "ffn.W2": "mlp.down_proj.weight",
    }
    state = {}
    for name, parameter in original.named_parameters().items():
        tensor = torch.tensor(parameter.data)
        if name in ("E", "norm_f.gamma"):
            state["model.embed_tokens.weight" if name == "E" else "model.norm.weight"] = tensor
            continue
        _, block, part = name.split(".", 2)
        if tensor.dim() == 2:
            tensor = tensor.T
        if part in ("attn.W_Q", "attn.W_K"):  # it rotates neighbours, Llama the two halves
            heads = tensor.shape[0] // (cfg.d_model // cfg.n_heads)
            tensor = tensor.reshape(heads, -1, 2, cfg.d_model).transpose(1, 2)
            tensor = tensor.reshape(-1, cfg.d_model)
        state[f"model.layers.{block}.{names[part]}"] = tensor
    model = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model, original


def test_glassllm_is_the_same_model_after_conversion():
    model, original = glass()
    ids = torch.randint(4, 1024, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
    np.testing.assert_allclose(logits.numpy(), original(ids.numpy()).data, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_llm_int8_keeps_glassllm(dtype):
    """Judged on text that the uncompressed model wrote: its perplexity there is its entropy."""
    model, _ = glass()
    torch.manual_seed(0)
    start = torch.randint(100, 1024, (64, 1))
    text = model.generate(start, max_new_tokens=127, do_sample=True, top_k=0, pad_token_id=0)
    base = perplexity(model, text.flatten(), context=128)
    assert base.perplexity < 150  # of 1024: it has learnt something
    mixed = perplexity(
        pumice.compress(model.to(dtype), pumice.LLMInt8()), text.flatten(), context=128
    )
    ratio, error = mixed.relative_to(base)
    assert abs(ratio - 1) < 0.005
    assert error < 0.005


WINDOWS = 12


@pytest.fixture(scope="module")
def smollm2() -> tuple[nn.Module, torch.Tensor, Perplexity]:
    model, tokenizer = load_model("smollm2-135m")
    ids = torch.tensor(tokenizer(load_text("wikipedia"), verbose=False).input_ids)
    return model, ids, perplexity(model, ids, windows=WINDOWS)


@needs_smollm2
@pytest.mark.network
@pytest.mark.slow
def test_smollm2_has_its_known_perplexity(smollm2):
    """A wrong dequantization, rotary layout or tokenizer shows here first."""
    _, _, base = smollm2
    assert base.perplexity == pytest.approx(22.18, rel=0.005)


@needs_smollm2
@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "least", "most"),
    [
        (NAIVE, 1.5, 4.0),
        (pumice.LLMInt8(threshold=6.0), 0.98, 1.03),
        (pumice.LLMInt8(threshold=4.0), 0.98, 1.02),
    ],
    ids=["naive", "threshold 6", "threshold 4"],
)
def test_smollm2_shows_what_the_paper_is_about(smollm2, recipe, least, most):
    model, ids, base = smollm2
    compressed = perplexity(pumice.compress(model, recipe), ids, windows=WINDOWS)
    ratio, _ = compressed.relative_to(base)
    assert least <= ratio <= most


@needs_smollm2
@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm2_is_the_same_model_with_pumices_attention(smollm2, dtype):
    """Against "eager", whose scores are a matrix in plain torch."""
    model, ids, _ = smollm2
    eager, ours = (copy.deepcopy(model).to(dtype) for _ in range(2))
    eager.set_attn_implementation("eager")
    ours.set_attn_implementation("pumice")
    base, quality = (perplexity(m, ids, windows=2) for m in (eager, ours))
    ratio, _ = quality.relative_to(base)
    # bfloat16 rounds at 2^-8, and either rounds elsewhere.
    assert ratio == pytest.approx(1.0, abs=1e-5 if dtype == torch.float32 else 5e-3)
    if dtype != torch.float32:
        return  # where two tokens are nearly as likely, rounding chooses
    prompts = torch.stack([ids[:40], ids[1000:1040]])
    mask = torch.ones_like(prompts)
    mask[1, :13] = 0  # a shorter prompt, padded on the left
    arguments = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    tokens = [m.generate(prompts, pad_token_id=0, **arguments) for m in (eager, ours)]
    assert torch.equal(*tokens)
    assert tokens[0].shape == (2, 64)


@needs_smollm2
@pytest.mark.network
@pytest.mark.slow
def test_smollm2_answers():
    model, tokenizer = load_model("smollm2-135m")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for candidate in (model, pumice.compress(model, pumice.LLMInt8())):
        answer = candidate.generate(ids, max_new_tokens=12, do_sample=False)
        assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])
