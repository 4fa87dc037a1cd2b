"""Open another library's checkpoint: first make and check all layers, then change the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice import _tensors
from pumice._assign import StateDictSource, TensorSource, adopt, check_skeleton
from pumice.integrations import is_transformers_model
from pumice.integrations.formats.registry import Reader, make_reader
from pumice.nn import CompressedLinear
from pumice.nn._replace import find_linear, replace_modules

# Files of settings beside config.json, by older writers, and the method they stand for.
_SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_INDEX = "model.safetensors.index.json"
# Tables that old checkpoints hold, and models compute.
_OBSOLETE = ("rotary_emb.inv_freq",)


def find_config(folder: Path) -> dict[str, Any] | None:
    """The ``quantization_config`` of a folder, or None if it has none.

    It is an entry of ``config.json``, or the file ``quantize_config.json`` (AutoGPTQ) or
    ``quant_config.json`` (AutoAWQ).

    Raises:
        ValueError: one of these files is not valid JSON.
    """
    config = _read_json(folder / "config.json").get("quantization_config")
    if isinstance(config, dict) and config:
        return config
    for name, method in _SETTINGS_FILES.items():
        settings = _read_json(folder / name)
        if settings:
            return {"quant_method": method, **settings}
    return None


def load_folder(
    folder: Path,
    config: Mapping[str, Any],
    model: nn.Module | None,
    device: torch.device | str | None,
) -> nn.Module:
    """Load a folder whose ``quantization_config`` is ``config``; see :func:`pumice.load`."""
    reader = make_reader(config)
    _tensors.require_safetensors()
    files = _find_files(folder)
    built_here = model is None
    if model is None:
        from pumice.integrations.transformers import build_skeleton

        model = build_skeleton(folder)
    with _tensors.opened(folder, files) as source:
        return _load(model, reader, source, device, check_dtypes=not built_here)


def load_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    config: Mapping[str, Any],
    device: torch.device | str | None = None,
) -> nn.Module:
    """Load a state dict in another library's format; see :func:`pumice.load`."""
    reader = make_reader(config)
    # Copies, for a layer would else share its memory with the state dict.
    copied = {
        name: tensor.detach().clone()
        for name, tensor in state_dict.items()
        if isinstance(tensor, Tensor)
    }
    return _load(model, reader, StateDictSource(copied), device, check_dtypes=True)


def _load(
    model: nn.Module,
    reader: Reader,
    source: TensorSource,
    device: torch.device | str | None,
    *,
    check_dtypes: bool,
) -> nn.Module:
    layers, used = _make_layers(model, reader, source)
    converted = _Converted(source, layers, used | _to_skip(model, source, layers))
    plan = check_skeleton(model, layers, converted, tied={}, check_dtypes=check_dtypes)
    model = replace_modules(model, layers)
    adopt(model, plan, converted, {}, torch.device(device or "cpu"))
    if is_transformers_model(model):
        from pumice.integrations.transformers import describe_layers

        describe_layers(model)
    return model if device is None else model.to(device)


def _make_layers(
    model: nn.Module, reader: Reader, source: TensorSource
) -> tuple[dict[str, CompressedLinear], set[str]]:
    """The compressed layers, complete, and the names of the tensors they were made from."""
    by_layer: dict[str, set[str]] = {}
    for full in source.names():
        layer, _, name = full.rpartition(".")
        by_layer.setdefault(layer, set()).add(name)
    layers: dict[str, CompressedLinear] = {}
    used: set[str] = set()
    for layer in sorted(n for n, entries in by_layer.items() if entries & set(reader.markers)):
        linear = find_linear(model, layer)
        entries = sorted(by_layer[layer] - {"bias"})
        prefix = f"{layer}." if layer else ""
        tensors = {name: source.read(prefix + name) for name in entries}
        try:
            layers[layer] = reader.make_layer(layer, linear, tensors)
        except (ValueError, TypeError) as error:
            named = layer in str(error)
            raise ValueError(str(error) if named else f"layer {layer!r}: {error}") from error
        _check_shape(layer, layers[layer], linear)
        used |= {prefix + name for name in entries}
    if not layers:
        raise ValueError(
            "the checkpoint holds no compressed layer of its format: no tensor is named "
            + " or ".join(f"'….{marker}'" for marker in reader.markers)
        )
    return layers, used


def _check_shape(name: str, layer: CompressedLinear, linear: nn.Linear) -> None:
    if layer.out_features != linear.out_features:
        raise ValueError(
            f"layer {name!r} has {layer.out_features} outputs in the checkpoint, but "
            f"{linear.out_features} in the model"
        )


def _to_skip(
    model: nn.Module, source: TensorSource, layers: Mapping[str, CompressedLinear]
) -> set[str]:
    """Tensors that the model does not have, and that say nothing.

    Such are biases of zeros, which AutoGPTQ gives to every layer, and computed tables.
    """
    expected = model.state_dict().keys()
    skipped = {name for name in source.names() if name.endswith(_OBSOLETE) and name not in expected}
    for layer in layers:
        bias = f"{layer}.bias" if layer else "bias"
        if bias in source.names() and bias not in expected and not bool(source.read(bias).any()):
            skipped.add(bias)
    return skipped


class _Converted:
    """The checkpoint as it would be in our names: the layers made of it, and the rest of it."""

    def __init__(
        self, source: TensorSource, layers: Mapping[str, CompressedLinear], used: set[str]
    ) -> None:
        self._source = source
        self._own: dict[str, Tensor] = {}
        for layer, module in layers.items():
            for name, buffer in module.named_buffers():
                self._own[f"{layer}.{name}" if layer else name] = buffer
        self._rest = source.names() - used

    def names(self) -> set[str]:
        return self._rest | self._own.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._own[name].shape) if name in self._own else self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._own[name].dtype if name in self._own else self._source.dtype(name)

    def read(self, name: str) -> Tensor:
        # A layer's own tensor is copied onto itself, which costs nothing.
        return self._own[name] if name in self._own else self._source.read(name)


def _find_files(folder: Path) -> list[str]:
    """The safetensors files of a folder; ValueError if they are not all there."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if (folder / _INDEX).is_file():
        weight_map = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / _INDEX} lacks its weight_map")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{folder / _INDEX} names {name!r}, which is no safetensors file")
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing, but {_INDEX} lists it")
        return names
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(names) != 1:
        from pumice.checkpoint import not_a_checkpoint

        if not names:
            raise not_a_checkpoint(folder)
        raise ValueError(
            f"{folder} holds {len(names)} safetensors files, none of them model.safetensors, and "
            f"no {_INDEX} to say which belong together"
        )
    return names


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return stored
