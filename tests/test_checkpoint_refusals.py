"""What pumice.load refuses, and that it names the culprit and leaves the model alone."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import pumice
from saved_model import X, assert_same_bits, make_model, save_model


def edit(folder: Path, change) -> None:
    """Change pumice.json."""
    path = folder / "pumice.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def rewrite_tensors(folder: Path, change) -> None:
    """Change the tensors and make the digest right again: what a digest cannot notice."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)

    def update(description):
        description["files"]["model.safetensors"] = {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }

    edit(folder, update)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


def test_changed_tensors_are_refused(tmp_path):
    save_model(tmp_path / "m")
    flip_a_bit(tmp_path / "m/model.safetensors")
    with pytest.raises(
        ValueError, match=r"model\.safetensors was changed since it was saved.*SHA-256"
    ):
        pumice.load(tmp_path / "m", make_model())
    pumice.load(tmp_path / "m", make_model(), verify=False)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
@pytest.mark.parametrize("verify", [True, False])
def test_truncated_tensors_are_refused(tmp_path, keep, verify):
    save_model(tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated.*bytes instead of"):
        pumice.load(tmp_path / "m", make_model(), verify=verify)


def test_a_malformed_file_of_the_right_length_is_refused(tmp_path):
    save_model(tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a valid safetensors file"):
        pumice.load(tmp_path / "m", make_model(), verify=False)


TENSOR_CHANGES = [
    (lambda t: t.pop("0.qweight"), r"1 missing tensors \(0\.qweight\)"),
    (lambda t: t.update(extra=torch.ones(2)), r"1 unexpected tensors \(extra\)"),
    (
        lambda t: t.update({"0.qweight": t["0.qweight"][:-1].clone()}),
        r"'0\.qweight' has shape \[19, 12\] in the checkpoint, but \[20, 12\] in the model",
    ),
    (
        lambda t: t.update({"3.qweight": t["3.qweight"].float()}),
        r"'3\.qweight' is torch\.float32 in the checkpoint, but torch\.int8",
    ),
    (
        lambda t: t.update({"3.weight_scale": t["3.weight_scale"].half()}),
        r"'3\.weight_scale' is torch\.float16 in the checkpoint, but torch\.float32",
    ),
    (
        lambda t: t.update({"1.bias": t["1.bias"].double()}),
        r"'1\.bias' is torch\.float64 in the checkpoint, but torch\.float32 in the model",
    ),
]

DESCRIPTION_CHANGES = [
    (
        lambda d: d.update(format_version=2, pumice_version="9.0"),
        r"version 2 \(written by pumice 9\.0",
    ),
    (lambda d: d.update(format="other"), "not the description of a pumice checkpoint"),
    (lambda d: d.pop("layers"), "lacks the entry 'layers'"),
    (
        lambda d: d["recipes"][0].update(name="int5"),
        "unknown recipe 'int5'; there are: .*int8, llm_int8",
    ),
    (lambda d: d["recipes"][0].update(bits=3), "recipe 'llm_int8' has no setting 'bits'"),
    (lambda d: d["layers"]["0"].update(type="Evil"), "layer '0': unknown layer type 'Evil'"),
    (lambda d: d["layers"]["0"].update(threshold=-2), "layer '0'.*threshold must be positive"),
    (lambda d: d["layers"]["0"].update(in_features=13), "layer '0' has in_features = 13 .* 12 in"),
    (lambda d: d["layers"]["0"].update(bias=False), "layer '0' has no bias in the checkpoint"),
    (lambda d: d["layers"].update({"7": d["layers"]["0"]}), "no module '7', which the checkpoint"),
    (lambda d: d["layers"].update({"1": d["layers"]["0"]}), r"Sequential\.1 is a LayerNorm"),
    (
        lambda d: d["files"].update({"../x.safetensors": {"bytes": 1, "sha256": ""}}),
        "no safetensors",
    ),
    (
        lambda d: d["files"].update({"x.bin": {"bytes": 1, "sha256": ""}}),
        "'x.bin', which is no safe",
    ),
    (lambda d: d.update(report={"layers": 3}), "pumice.json"),
    (lambda d: d.update(recipes=5), "pumice.json"),
]


@pytest.mark.parametrize(("change", "message"), TENSOR_CHANGES)
def test_tensors_that_do_not_fit_are_named_and_the_model_is_left(tmp_path, change, message):
    save_model(tmp_path / "m")
    rewrite_tensors(tmp_path / "m", change)
    assert_refused(tmp_path / "m", message)


@pytest.mark.parametrize(("change", "message"), DESCRIPTION_CHANGES)
def test_a_description_that_does_not_fit_is_refused(tmp_path, change, message):
    save_model(tmp_path / "m")
    edit(tmp_path / "m", change)
    assert_refused(tmp_path / "m", message)


def assert_refused(folder: Path, message: str) -> None:
    skeleton = make_model()
    modules, state = dict(skeleton.named_modules()), make_model()
    with pytest.raises(ValueError, match=message):
        pumice.load(folder, skeleton)
    assert dict(skeleton.named_modules()) == modules
    assert_same_bits(skeleton, state)


def test_a_model_of_another_dtype_is_told_how_to_convert(tmp_path):
    save_model(tmp_path / "m", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"convert the model first: model\.to\(torch\.bfloat16\)"):
        pumice.load(tmp_path / "m", make_model())


def test_a_description_that_is_no_json(tmp_path):
    save_model(tmp_path / "m")
    (tmp_path / "m/pumice.json").write_text('{"format": "pum')
    with pytest.raises(ValueError, match=r"pumice\.json is not valid JSON"):
        pumice.load(tmp_path / "m", make_model())


def test_pickles_are_refused_by_name(tmp_path):
    torch.save({"x": X}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle.*any code"):
            pumice.load(path, make_model())


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        pumice.load(tmp_path / "nowhere", make_model())
    with pytest.raises(
        FileNotFoundError, match=r"is no pumice checkpoint: it holds no pumice\.json"
    ):
        pumice.load(tmp_path, make_model())


def test_without_a_model_and_without_config(tmp_path):
    save_model(tmp_path / "m")
    with pytest.raises(ValueError, match=r"no config\.json.*pumice\.load\(folder, model\)"):
        pumice.load(tmp_path / "m")


def test_safetensors_missing(tmp_path, monkeypatch):
    save_model(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'pumice\[hf\]'"):
        pumice.save(make_model(), tmp_path / "n")
    with pytest.raises(ImportError, match=r"pip install 'pumice\[hf\]'"):
        pumice.load(tmp_path / "m", make_model())


def test_is_checkpoint(tmp_path):
    save_model(tmp_path / "m")
    assert pumice.checkpoint.is_checkpoint(tmp_path / "m")
    assert not pumice.checkpoint.is_checkpoint(tmp_path)
