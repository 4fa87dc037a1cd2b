"""Whole checkpoints of other libraries' formats, into plain modules and transformers models."""

import json
from pathlib import Path

import pytest
import torch
from format_layouts import awq_layer, gptq_layer, make_weight, packed_layer
from safetensors.torch import load_file, save_file
from torch import nn

import pumice
from pumice.nn import Int4Linear, Int8Linear
from pumice.ops import int4_pack

transformers = pytest.importorskip("transformers", reason="pumice[hf] is not installed")

X = torch.linspace(-2, 2, 3 * 32).reshape(3, 32)
IDS = torch.arange(18).reshape(2, 9)
CALIBRATION = [{"input_ids": torch.arange(96).reshape(2, 48)}]
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}


def packed_config(**weights) -> dict:
    settings = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": {**settings, "group_size": 16, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["2"],
    }


class Example:
    """A state dict by hand: two quantized layers, the second without bias, and a plain one."""

    def __init__(self, lay_out, config: dict, *, act_order: bool = False) -> None:
        torch.manual_seed(1)
        self.config = config
        weights = [make_weight(48, 32, act_order=act_order), make_weight(16, 48, seed=1)]
        self.dense = [weight.dense() for weight in weights]
        self.state = {
            **{f"0.{name}": tensor for name, tensor in lay_out(weights[0]).items()},
            "0.bias": torch.randn(48),
            **{f"1.{name}": tensor for name, tensor in lay_out(weights[1]).items()},
            "2.weight": torch.randn(8, 16),
            "2.bias": torch.randn(8),
        }

    def save(self, folder: Path) -> Path:
        folder.mkdir()
        save_file(self.state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"quantization_config": self.config}))
        return folder

    def check(self, model: nn.Module) -> None:
        kinds = [type(module) for module in model]
        assert kinds == [Int4Linear, Int4Linear, nn.Linear]
        x = X
        for module, weight in zip(model, [*self.dense, self.state["2.weight"]], strict=True):
            if isinstance(module, Int4Linear):
                torch.testing.assert_close(module.dequantize(), weight, rtol=0, atol=0)
            x = x @ weight.T + (0 if module.bias is None else module.bias)
        assert torch.equal(model[0].bias, self.state["0.bias"])
        assert torch.equal(model[2].weight, self.state["2.weight"])
        torch.testing.assert_close(model(X), x, rtol=1e-4, atol=1e-3)


def make_module(device: str = "cpu") -> nn.Sequential:
    with torch.device(device):
        return nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16, bias=False), nn.Linear(16, 8))


EXAMPLES = {
    "gptq": lambda: Example(gptq_layer, GPTQ, act_order=True),
    "gptq_v2": lambda: Example(
        lambda weight: gptq_layer(weight, 2), {**GPTQ, "checkpoint_format": "gptq_v2"}
    ),
    "awq": lambda: Example(awq_layer, AWQ),
    "compressed-tensors": lambda: Example(
        lambda weight: packed_layer(weight, symmetric=False), packed_config()
    ),
}


@pytest.fixture(params=EXAMPLES)
def format_name(request) -> str:
    return request.param


@pytest.fixture
def example(format_name) -> Example:
    return EXAMPLES[format_name]()


# ---- plain modules


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_dict_into_a_plain_module(example, device):
    stored = {name: tensor.clone() for name, tensor in example.state.items()}
    model = pumice.load(example.state, make_module(device), quantization_config=example.config)
    example.check(model)
    for buffer in model.buffers():
        buffer.zero_()  # is not the memory of the state dict
    assert all(torch.equal(tensor, example.state[name]) for name, tensor in stored.items())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_folder_into_a_plain_module(example, device, tmp_path):
    example.check(pumice.load(example.save(tmp_path / "m"), make_module(device)))


def test_what_is_saved_is_what_was_loaded(example, format_name, tmp_path):
    """File to file: the tensors are the same, bit by bit."""
    model = pumice.load(example.save(tmp_path / "m"), make_module("meta"))
    pumice.save(model, tmp_path / "again", format=format_name)
    state = load_file(tmp_path / "again/model.safetensors")
    assert state.keys() == example.state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == example.state[name].dtype, name
        assert torch.equal(tensor, example.state[name]), name
    example.check(pumice.load(tmp_path / "again", make_module("meta")))


def test_into_our_own_format_and_back(example, format_name, tmp_path):
    model = pumice.load(example.save(tmp_path / "m"), make_module("meta"))
    pumice.save(model, tmp_path / "ours")
    ours = pumice.load(tmp_path / "ours", make_module("meta"))
    example.check(ours)
    pumice.save(ours, tmp_path / "theirs", format=format_name)
    example.check(pumice.load(tmp_path / "theirs", make_module("meta")))


def test_a_single_layer():
    weight = make_weight(8, 32)
    layer = pumice.load(gptq_layer(weight), nn.Linear(32, 8, False), quantization_config=GPTQ)
    torch.testing.assert_close(layer.dequantize(), weight.dense(), rtol=0, atol=0)


def test_settings_in_files_of_their_own(tmp_path):
    """AutoGPTQ's and AutoAWQ's; their tensors have names of their own, too."""
    for name, file_name, settings in (
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 16, "sym": False}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 16, "version": "GEMM"}),
    ):
        example = EXAMPLES[name]()
        folder = example.save(tmp_path / name)
        (folder / "config.json").write_text("{}")
        (folder / file_name).write_text(json.dumps(settings))
        (folder / "model.safetensors").rename(folder / f"{name}_model-4bit-16g.safetensors")
        example.check(pumice.load(folder, make_module()))


def test_several_files(example, tmp_path):
    folder = example.save(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index, name in enumerate(sorted(example.state)):
        weight_map[name] = f"model-{index % 2 + 1:05d}-of-00002.safetensors"
    for file_name in set(weight_map.values()):
        part = {n: example.state[n] for n in weight_map if weight_map[n] == file_name}
        save_file(part, folder / file_name)
    index_path = folder / "model.safetensors.index.json"
    index_path.write_text(json.dumps({"weight_map": weight_map}))
    example.check(pumice.load(folder, make_module()))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing"):
        pumice.load(folder, make_module())


def test_biases_of_zeros_that_the_model_does_not_have(example):
    """AutoGPTQ writes one for every layer."""
    example.state["1.bias"] = torch.zeros(16)
    example.check(pumice.load(example.state, make_module(), quantization_config=example.config))
    example.state["1.bias"][3] = 1
    with pytest.raises(ValueError, match=r"unexpected tensors \(1\.bias"):
        pumice.load(example.state, make_module(), quantization_config=example.config)


def test_gptq_settings_of_single_layers():
    example = EXAMPLES["gptq"]()
    weight = make_weight(16, 48, bits=8, group_size=-1)
    example.state.update({f"1.{name}": tensor for name, tensor in gptq_layer(weight).items()})
    config = {**GPTQ, "dynamic": {"+:1": {"bits": 8, "group_size": -1}, "-:2": {}}}
    model = pumice.load(example.state, make_module(), quantization_config=config)
    assert [model[0].bits, model[1].bits] == [4, 8]
    torch.testing.assert_close(model[1].dequantize(), weight.dense(), rtol=0, atol=0)


# ---- several kinds of layers: compressed-tensors alone can say so


def test_layers_of_all_kinds_in_one_model(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    for name, recipe in {
        "0": pumice.RTN(bits=4, group_size=16),
        "1": pumice.RTN(bits=3, group_size=32, symmetric=False),
        "2": pumice.Int8(),
        "3": pumice.Int8(activations="per_tensor", weights="per_tensor"),
        "4": pumice.LLMInt8(),
    }.items():
        pumice.compress(model, recipe, include=name, exclude=(), inplace=True)
    pumice.save(model, tmp_path / "m", format="compressed-tensors")
    config = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["5"]
    loaded = pumice.load(tmp_path / "m", nn.Sequential(*(nn.Linear(32, 32) for _ in range(6))))
    kinds = [Int4Linear, Int4Linear, Int8Linear, Int8Linear, Int4Linear, nn.Linear]
    assert [type(module) for module in loaded] == kinds
    assert [loaded[i].config() for i in range(4)] == [model[i].config() for i in range(4)]
    for ours, theirs in zip(model[:5], loaded[:5], strict=True):
        torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=0, atol=0)
    for i in range(4):
        assert torch.equal(model[i](X), loaded[i](X))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_closest_target_counts(order):
    """A layer's name before a pattern, a pattern before a class, wherever they stand."""
    targets = {2: "1", 4: "re:0", 8: "Linear"}  # by bits
    groups = [
        {
            "targets": [target],
            "weights": {"num_bits": bits, "symmetric": True, "strategy": "group", "group_size": 16},
        }
        for bits, target in targets.items()
    ]
    config = packed_config()
    config["config_groups"] = {f"group_{i}": groups[i] for i in order}
    state = {}
    for index, bits in enumerate([4, 2, 8]):
        weight = make_weight(8, 16, bits, symmetric=True)
        for name, tensor in packed_layer(weight, symmetric=True).items():
            state[f"{index}.{name}"] = tensor
    model = nn.Sequential(*(nn.Linear(16, 8, bias=False) for _ in range(3)))
    model = pumice.load(state, model, quantization_config=config)
    assert [layer.bits for layer in model] == [4, 2, 8]


def test_a_static_activation_scale(tmp_path):
    layer = Int8Linear.from_linear(
        nn.Linear(32, 8), activations="per_tensor", activation_scale=0.02
    )
    model = nn.Sequential(layer)
    pumice.save(model, tmp_path / "m", format="compressed-tensors")
    loaded = pumice.load(tmp_path / "m", nn.Sequential(nn.Linear(32, 8)))
    assert loaded[0].config() == layer.config()
    assert torch.equal(loaded(X), model(X))


# ---- transformers


def llama(*, tied: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


RECIPES = {
    "gptq": pumice.GPTQ(group_size=16, static_groups=False),
    "gptq_v2": pumice.RTN(bits=3, group_size=32, symmetric=False),
    "awq": pumice.RTN(group_size=16, symmetric=False),
    "compressed-tensors": pumice.GPTQ(group_size=16, symmetric=False),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transformers_model_there_and_back(format_name, tied, dtype, tmp_path):
    recipe = RECIPES[format_name]
    model = pumice.compress(llama(tied=tied, dtype=dtype), recipe, CALIBRATION)
    pumice.save(model, tmp_path / "m", format=format_name)
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_method"] == format_name.removesuffix("_v2")
    loaded = pumice.load(tmp_path / "m")
    assert not loaded.training
    assert loaded.dtype == dtype
    assert sum(isinstance(module, Int4Linear) for module in loaded.modules()) == 14
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            ours, theirs = module.dequantize(), loaded.get_submodule(name).dequantize()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    if tied:
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(logits(loaded), logits(model), **tolerance)
    into = pumice.load(tmp_path / "m", llama(tied=tied, dtype=dtype))
    assert torch.equal(logits(into), logits(loaded))


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="needs transformers 5")
def test_loaded_from_another_library_saved_as_ours_opened_by_transformers(format_name, tmp_path):
    import pumice.integrations.transformers  # registers the quantizer

    model = pumice.compress(llama(), RECIPES[format_name], CALIBRATION)
    pumice.save(model, tmp_path / "theirs", format=format_name)
    loaded = pumice.load(tmp_path / "theirs")
    pumice.save(loaded, tmp_path / "ours")
    opened, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(opened), logits(loaded))
    loaded.save_pretrained(tmp_path / "again")  # transformers' own way
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(loaded))


def test_a_rotary_table_of_an_old_checkpoint_is_skipped(tmp_path):
    model = pumice.compress(llama(), pumice.RTN(group_size=16))
    pumice.save(model, tmp_path / "m", format="gptq")
    state = load_file(tmp_path / "m/model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, tmp_path / "m/model.safetensors")
    assert torch.equal(logits(pumice.load(tmp_path / "m")), logits(model))


def test_a_model_of_the_command_line(tmp_path):
    """load_model, which every command uses, tells these folders from transformers' own."""
    tiny_llama = pytest.importorskip("tiny_llama")
    from pumice.integrations.models import load_model

    model = pumice.compress(llama(), pumice.RTN(group_size=16))
    pumice.save(model, tmp_path / "m", format="gptq", tokenizer=tiny_llama.make_tokenizer())
    loaded, tokenizer = load_model(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(model))
    assert tokenizer("ab").input_ids


# ---- what a format has no place for


def test_layers_that_differ_in_group_size(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    pumice.compress(model, pumice.RTN(group_size=16), include="0", inplace=True)
    pumice.compress(model, pumice.RTN(group_size=32), include="1", inplace=True)
    for name in ("gptq", "awq"):
        with pytest.raises(ValueError, match=r"group_size for all layers.*'0' is 16.*'1' is 32"):
            pumice.save(model, tmp_path / "m", format=name)
    assert not list(tmp_path.iterdir())


def test_fractional_zero_points(tmp_path, format_name):
    linear = nn.Linear(32, 8)
    q = torch.zeros(8, 32, dtype=torch.uint8)
    scales = torch.ones(8, 2)
    layer = Int4Linear.from_quantized(linear, q, scales, scales + 0.5, bits=4, group_size=16)
    with pytest.raises(ValueError, match=r"layer '0' cannot be written as .*fractional"):
        pumice.save(nn.Sequential(layer), tmp_path / "m", format=format_name)
    assert not list(tmp_path.iterdir())
    assert torch.equal(layer.qweight, int4_pack(q))


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_int8_layers_have_no_place_in_gptq_and_awq(name, tmp_path):
    model = pumice.compress(nn.Sequential(nn.Linear(32, 8)), pumice.Int8(), exclude=())
    with pytest.raises(ValueError, match=r"layer '0' cannot be written.*not a Int8Linear"):
        pumice.save(model, tmp_path / "m", format=name)
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_and_a_model_without_layers(tmp_path):
    with pytest.raises(ValueError, match=r"'gguf' is not one of pumice, awq, compressed-tensors"):
        pumice.save(make_module(), tmp_path / "m", format="gguf")
    with pytest.raises(ValueError, match="no compressed layer to write as 'gptq'"):
        pumice.save(make_module(), tmp_path / "m", format="gptq")
    assert not list(tmp_path.iterdir())
