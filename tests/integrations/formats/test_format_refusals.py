"""Bad checkpoints of other libraries are refused by name, and the model is as it was."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from format_layouts import awq_layer, gptq_layer, make_weight, packed_layer
from safetensors.torch import save_file
from torch import nn

import pumice

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}


def packed_config(change=lambda group: None, **entries) -> dict:
    group = {"targets": ["Linear"], "weights": dict(WEIGHTS)}
    change(group)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        **entries,
    }


def make_state(lay_out=gptq_layer) -> dict[str, torch.Tensor]:
    return {
        **{f"0.{name}": t for name, t in lay_out(make_weight(8, 32, symmetric=True)).items()},
        "0.bias": torch.zeros(8),
        "1.weight": torch.ones(2, 8),
        "1.bias": torch.zeros(2),
    }


STATES = {
    "gptq": lambda: make_state(),
    "awq": lambda: make_state(awq_layer),
    "compressed-tensors": lambda: make_state(lambda w: packed_layer(w, symmetric=True)),
}


def make_module() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))


def save_folder(folder: Path, config: dict = GPTQ) -> Path:
    folder.mkdir()
    save_file(make_state(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def refused(message: str, *args, model: nn.Module | None = None, error=ValueError, **kwargs):
    """pumice.load refuses, and the model keeps its modules and their values."""
    model = make_module() if model is None else model
    modules, state = list(model), {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(error, match=message):
        pumice.load(*args, model, **kwargs)
    assert list(model) == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", STATES)
def test_the_unchanged_example_is_read(name):
    config = {"gptq": GPTQ, "awq": AWQ, "compressed-tensors": packed_config()}[name]
    model = pumice.load(STATES[name](), make_module(), quantization_config=config)
    assert isinstance(model[0], pumice.nn.Int4Linear)


# ---- configurations


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"quant_method None is not read, only awq, compressed-tensors, gptq"),
        ({"quant_method": "aqlm"}, r"quant_method 'aqlm' is not read"),
        ({**GPTQ, "bits": 5}, r"bits must be one of \(2, 3, 4, 8\), not 5"),
        ({**GPTQ, "bits": "4"}, r"bits must be one of .* not '4'"),
        ({**GPTQ, "bits": None}, r"bits must be one of .* not None"),
        ({**GPTQ, "group_size": 24}, r"group_size is 24; read are -1.*multiples of 16"),
        ({**GPTQ, "group_size": 0}, r"group_size is 0"),
        ({**GPTQ, "group_size": "16"}, r"group_size must be an integer, not '16'"),
        ({**GPTQ, "checkpoint_format": "marlin"}, r"checkpoint_format 'marlin' is not read"),
        ({**GPTQ, "pack_dtype": "int64"}, r"pack_dtype 'int64' is not read"),
        ({**AWQ, "bits": 8}, r"AWQ with 8 bits is not read"),
        ({**AWQ, "version": "gemv_fast"}, r"AWQ's version 'gemv_fast' is not read, only 'gemm'"),
        ({"quant_method": "compressed-tensors"}, r"lacks its config_groups"),
        (packed_config(sparsity_config={"format": "sparse-bitmask"}), r"sparsity_config"),
        (packed_config(kv_cache_scheme={"num_bits": 8}), r"kv_cache_scheme is not read"),
        (packed_config(transform_config={"config_groups": {}}), r"transform_config is not read"),
        (packed_config(format="nvfp4-pack-quantized"), r"group_0 has format 'nvfp4-pack-quant"),
        (packed_config(lambda g: g.pop("weights")), r"group_0 does not say how weights"),
        (packed_config(lambda g: g["weights"].update(num_bits=6)), r"num_bits must be one of"),
        (packed_config(lambda g: g["weights"].update(type="float")), r"of type 'float'"),
        (packed_config(lambda g: g["weights"].update(strategy="block")), r"strategy 'block'"),
        (packed_config(lambda g: g["weights"].update(group_size=None)), r"group_size must be an"),
        (
            packed_config(lambda g: g.update(output_activations=ACTIVATIONS)),
            r"quantizes output activations",
        ),
        (
            packed_config(lambda g: g.update(input_activations={**ACTIVATIONS, "dynamic": True})),
            r"packed weights with quantized activations",
        ),
        (packed_config(lambda g: g.update(format="int-quantized")), r"of 4 bits are not read"),
        (
            packed_config(
                lambda g: g.update(
                    format="int-quantized",
                    weights={**WEIGHTS, "num_bits": 8},
                    input_activations={**ACTIVATIONS, "dynamic": True},
                )
            ),
            r"'channel' or 'tensor'",
        ),
        *(
            (
                packed_config(
                    lambda g, change=change: g.update(
                        format="int-quantized",
                        weights={**WEIGHTS, "num_bits": 8, "strategy": "channel"},
                        input_activations={**ACTIVATIONS, "dynamic": True, **change},
                    )
                ),
                message,
            )
            for change, message in [
                ({"num_bits": 4}, r"input_activations with num_bits = 4"),
                ({"type": "float"}, r"input_activations with type = 'float'"),
                ({"symmetric": False}, r"input_activations with symmetric = False"),
                ({"strategy": "group"}, r"input_activations with strategy = 'group'"),
                ({"dynamic": "local"}, r"input_activations with dynamic = 'local'"),
                ({"dynamic": False}, r"static scales for every token"),
            ]
        ),
        (packed_config(lambda g: g.update(targets=["re:.*mlp.*"])), r"has layer '0' as a target"),
    ],
)
def test_configurations_are_refused_by_name(config, message):
    state = STATES["compressed-tensors"]()
    refused(message, state, quantization_config=config)


# ---- tensors against the model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"0.qweight": s["0.qweight"][1:]}), r"'0\.qweight' must have shape"),
        (lambda s: s.update({"0.bias": torch.zeros(9)}), r"'0\.bias' has shape \[9\]"),
        (lambda s: s.update({"0.bias": torch.zeros(8).half()}), r"'0\.bias' is torch\.float16 in"),
        (lambda s: s.pop("1.weight"), r"1 missing tensors \(1\.weight\)"),
        (lambda s: s.update({"2.weight": torch.ones(1)}), r"1 unexpected tensors \(2\.weight"),
        (
            lambda s: s.update({f"2.{n[2:]}": t for n, t in s.items() if n.startswith("0.")}),
            r"has no module '2'",
        ),
        (lambda s: s["0.g_idx"].fill_(7), r"'0\.g_idx' names group 7"),
        (
            lambda s: s["0.g_idx"].copy_(1 - s["0.g_idx"]).__setitem__(0, 0),
            r"layer '0': g_idx must",
        ),
        (lambda s: s["0.qzeros"].fill_(-1), r"'0\.qzeros' stores 15"),
        (lambda s: s.update({"0.scales": s["0.scales"].to("meta")}), r"'0' are on different dev"),
    ],
)
def test_tensors_are_refused_by_name(change, message):
    state = STATES["gptq"]()
    change(state)
    refused(message, state, quantization_config=GPTQ)


@pytest.mark.parametrize("name", STATES)
def test_a_layer_of_another_size_than_the_models(name):
    config = {"gptq": GPTQ, "awq": AWQ, "compressed-tensors": packed_config()}[name]
    for linear in (nn.Linear(32, 16), nn.Linear(48, 8)):
        model = nn.Sequential(linear, nn.Linear(8, 2))
        message = r"0(\.\w+)?'.*(must have shape|is \[8, 32\], but|8 outputs)"
        refused(message, STATES[name](), model=model, quantization_config=config)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_bits_that_the_shapes_deny(bits):
    refused(
        r"'0\.qweight' must have shape",
        STATES["gptq"](),
        quantization_config={**GPTQ, "bits": bits},
    )


def test_the_formats_taken_for_each_other():
    refused(r"'0\.g_idx' is not part of", STATES["gptq"](), quantization_config=AWQ)
    refused(r"'0\.qweight' must have shape", STATES["awq"](), quantization_config=GPTQ)
    refused(
        r"no compressed layer of its format", STATES["awq"](), quantization_config=packed_config()
    )


def test_act_order_without_a_g_idx():
    state = STATES["gptq"]()
    del state["0.g_idx"]
    refused(r"'0\.g_idx' is missing", state, quantization_config={**GPTQ, "desc_act": True})


def test_a_state_dict_alone():
    with pytest.raises(TypeError, match="needs the model to load into and its quantization_config"):
        pumice.load(STATES["gptq"](), make_module())
    with pytest.raises(TypeError, match="needs the model to load into and its quantization_config"):
        pumice.load(STATES["gptq"](), quantization_config=GPTQ)


# ---- files


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files(tmp_path, keep):
    folder = save_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(r"model\.safetensors is not a valid safetensors file", folder)


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.bin", "gptq_model.pt"])
def test_pickles(tmp_path, name):
    folder = save_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"0.weight": torch.ones(1)}))
    refused(rf"{name} is a pickle, which can run any code", folder)


def test_an_unknown_method_in_a_folder(tmp_path):
    folder = save_folder(tmp_path / "m", {"quant_method": "aqlm"})
    refused(r"quant_method 'aqlm' is not read", folder)


def test_a_folder_that_is_not_quantized(tmp_path):
    folder = save_folder(tmp_path / "m")
    (folder / "config.json").write_text("{}")
    refused(r"no quantization_config in a config\.json", folder, error=FileNotFoundError)
    model = pumice.load(folder, make_module(), quantization_config=GPTQ)
    assert isinstance(model[0], pumice.nn.Int4Linear)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_config_that_is_no_json_object(tmp_path, text):
    folder = save_folder(tmp_path / "m")
    (folder / "config.json").write_text(text)
    refused(r"config\.json (is not valid JSON|does not hold a JSON object)", folder)


def test_several_files_without_an_index(tmp_path):
    folder = save_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    save_file({"x": torch.ones(1)}, folder / "b.safetensors")
    refused(r"holds 2 safetensors files, none of them model\.safetensors", folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "weights.bin"])
def test_an_index_that_points_elsewhere(tmp_path, name):
    folder = save_folder(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"0.qweight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(r"names '.*', which is no safetensors file", folder)


def test_a_folder_without_an_architecture_needs_a_model(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"pass the uncompressed model to load into"):
        pumice.load(save_folder(tmp_path / "m"))


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_nothing_is_left_of_a_save_that_failed(name, tmp_path, monkeypatch):
    model = pumice.load(STATES["gptq"](), make_module(), quantization_config=GPTQ)
    target = tmp_path / "m"
    pumice.save(model, target, format=name)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pumice.integrations.formats.writing._set_entry", fail)
    with pytest.raises(OSError, match="No space left"):
        pumice.save(model, target, format=name, overwrite=True)
    with pytest.raises(FileExistsError):
        pumice.save(model, target, format=name)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
