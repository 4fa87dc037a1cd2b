"""transformers models: compressed, saved, and opened by both libraries."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn

import pumice
import pumice.integrations.transformers
from pumice.nn import Int8MixedLinear

IDS = torch.arange(18).reshape(2, 9)
VERSION = int(transformers.__version__.split(".")[0])
needs_version_5 = pytest.mark.skipif(VERSION < 5, reason="from_pretrained needs transformers 5")


def llama(*, tied: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Odd sizes on purpose: 36 wide, 69 inner, three heads on one."""
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=36,
        intermediate_size=69,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    return build(transformers.LlamaForCausalLM, config, dtype)


def opt(*, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=97,
        hidden_size=24,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
        dtype=dtype,
    )
    return build(transformers.OPTForCausalLM, config, dtype)


def build(model_type, config, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


MODELS = {
    "llama, tied": lambda dtype: llama(dtype=dtype),
    "llama, untied": lambda dtype: llama(tied=False, dtype=dtype),
    "opt": lambda dtype: opt(dtype=dtype),
}


@pytest.fixture(params=MODELS)
def make_model(request):
    return MODELS[request.param]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def assert_same_model(model: nn.Module, other: nn.Module) -> None:
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other_state[name].dtype, name
        assert torch.equal(tensor, other_state[name]), name
    assert torch.equal(logits(model), logits(other))


def test_all_linear_layers_but_the_head(make_model):
    model = make_model(torch.float32)
    result = pumice.compress(model, pumice.LLMInt8(), [{"input_ids": IDS}])
    report = pumice.report(result)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {layer.name for layer in report.layers} == linears - {"lm_head"}
    assert list(report.skipped) == ["lm_head"]
    assert all(layer.relative_error < 0.03 for layer in report.layers)
    exact = logits(model)
    assert (logits(result) - exact).norm() < 0.03 * exact.norm()


def test_an_output_embedding_of_another_name_is_left():
    class OddHead(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.unembed = nn.Linear(36, 97, bias=False)

        def get_output_embeddings(self):
            return getattr(self, "unembed", None)

    result = pumice.compress(OddHead(llama().config), pumice.LLMInt8())
    assert pumice.report(result).skipped.keys() == {"lm_head", "unembed"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_load_builds_the_model(make_model, dtype, tmp_path):
    model = pumice.compress(make_model(dtype), pumice.LLMInt8(threshold=3.0))
    pumice.save(model, tmp_path / "m")
    ours = pumice.load(tmp_path / "m")
    assert_same_model(ours, model)
    assert not ours.training
    assert pumice.report(ours) == pumice.report(model)


@needs_version_5
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_from_pretrained_opens_what_pumice_saved(make_model, dtype, tmp_path):
    model = pumice.compress(make_model(dtype), pumice.LLMInt8(threshold=3.0))
    pumice.save(model, tmp_path / "m")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_model(theirs, model)
    layer = next(module for module in theirs.modules() if isinstance(module, Int8MixedLinear))
    assert layer.threshold == 3.0
    assert theirs.dtype == dtype


def test_ties_of_the_embedding_survive(tmp_path):
    pumice.save(pumice.compress(llama(), pumice.LLMInt8()), tmp_path / "m")
    loaded = pumice.load(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_loading_into_a_given_model(tmp_path):
    model = pumice.compress(llama(), pumice.Int8())
    pumice.save(model, tmp_path / "m")
    assert_same_model(pumice.load(tmp_path / "m", llama()), model)


def test_a_rotary_table_that_was_cast_comes_back_cast(tmp_path):
    """model.bfloat16() casts the table too, though no state dict holds it."""
    model = pumice.compress(llama(), pumice.LLMInt8()).bfloat16()
    pumice.save(model, tmp_path / "m")
    assert_same_model(pumice.load(tmp_path / "m"), model)


def test_generation_goes_on_where_it_was(tmp_path):
    model = pumice.compress(llama(), pumice.LLMInt8())
    model.generation_config.eos_token_id = 7
    model.generation_config.max_new_tokens = 5
    pumice.save(model, tmp_path / "m")
    loaded = pumice.load(tmp_path / "m")
    assert loaded.generation_config.eos_token_id == 7
    arguments = {"input_ids": IDS[:1], "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(**arguments), model.generate(**arguments))


@needs_version_5
def test_transformers_own_save_works_after_compress(make_model, tmp_path):
    model = pumice.compress(make_model(torch.float32), pumice.LLMInt8())
    model.save_pretrained(tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert_same_model(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same_model(again, model)


def test_compress_does_not_mark_the_original():
    model = llama()
    pumice.compress(model, pumice.LLMInt8())
    assert getattr(model.config, "quantization_config", None) is None


@needs_version_5
def test_loading_in_another_dtype_keeps_the_compressed_weights(tmp_path):
    model = pumice.compress(llama(), pumice.LLMInt8())
    pumice.save(model, tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith(("qweight", "weight_scale")):
            assert torch.equal(loaded.get_buffer(name), buffer)
    assert loaded.dtype == torch.bfloat16
    assert (logits(loaded) - logits(model)).norm() < 0.05 * logits(model).norm()


def test_other_heads_than_language_modelling(tmp_path):
    config = copy.deepcopy(llama().config)
    config.num_labels, config.pad_token_id = 3, 0
    model = transformers.LlamaForSequenceClassification(config).eval()
    result = pumice.compress(model, pumice.LLMInt8(), exclude="score")
    pumice.save(result, tmp_path / "m")
    loaded = pumice.load(tmp_path / "m")
    assert type(loaded) is transformers.LlamaForSequenceClassification
    assert_same_model(loaded, result)


def test_gpt2_says_that_its_convolutions_are_no_linear_layers():
    config = transformers.GPT2Config(vocab_size=97, n_embd=24, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match=r"no linear layer is chosen: lm_head: excluded.*Conv1D"):
        pumice.compress(model, pumice.LLMInt8())
    with pytest.raises(ValueError, match=r"GPT2Model holds no nn\.Linear.*Conv1D"):
        pumice.compress(model.transformer, pumice.LLMInt8())


def test_fine_tuning_around_frozen_layers():
    model = pumice.compress(llama(), pumice.LLMInt8()).train()
    frozen = {name: b.clone() for name, b in model.named_buffers() if b.dtype == torch.int8}
    assert len(frozen) == 14
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    for name, weight in frozen.items():
        assert torch.equal(model.get_buffer(name), weight)


def test_compiles_as_one_graph():
    model = pumice.compress(llama(), pumice.LLMInt8())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (IDS, IDS[:, :5]):
            y = compiled(ids, use_cache=False).logits
            torch.testing.assert_close(y, model(ids).logits)


# ---- refused


@needs_version_5
def test_nothing_is_quantized_while_loading(tmp_path):
    llama().save_pretrained(tmp_path / "m")
    config = pumice.integrations.transformers.PumiceConfig({"x": {}})
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", quantization_config=config
        )


@pytest.mark.skipif(VERSION >= 5, reason="transformers 5 opens them")
def test_version_4_is_told_what_to_do(tmp_path):
    pumice.save(pumice.compress(llama(), pumice.LLMInt8()), tmp_path / "m")
    with pytest.raises(ImportError, match=r"transformers >= 5.*pumice\.load\(folder\) works"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_a_config_without_layers(tmp_path):
    pumice.save(pumice.compress(llama(), pumice.LLMInt8()), tmp_path / "m")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["layers"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lists no layers.*pumice\.save"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_an_architecture_that_transformers_lacks(tmp_path):
    pumice.save(pumice.compress(llama(), pumice.LLMInt8()), tmp_path / "m")
    path = tmp_path / "m/config.json"
    config = json.loads(path.read_text())
    config["architectures"] = ["GraniteOfTomorrow"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'GraniteOfTomorrow'.*pumice\.load\(folder, model\)"):
        pumice.load(tmp_path / "m")


@needs_version_5
def test_from_pretrained_refuses_values_out_of_range(tmp_path):
    """Kernels on CUDA do not look at them, so that somebody has to."""
    model = pumice.compress(llama(), pumice.RTN(bits=4, group_size=16, symmetric=False))
    model.model.layers[1].mlp.up_proj.zeros.fill_(16)
    pumice.save(model, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.mlp.up_proj': .*zeros hold 16"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
