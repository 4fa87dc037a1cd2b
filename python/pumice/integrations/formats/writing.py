"""Write a model in another library's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from pumice import _tensors
from pumice._files import new_folder
from pumice.integrations import is_transformers_model
from pumice.integrations.formats.registry import make_writer
from pumice.nn import CompressedLinear


def save(
    model: nn.Module,
    folder: Path,
    format_name: str,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a folder of safetensors with a ``quantization_config``; see :func:`pumice.save`."""
    writer = make_writer(format_name)
    _tensors.require_safetensors()
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear)
    }
    if not layers:
        raise ValueError(f"save: the model holds no compressed layer to write as {format_name!r}")
    tensors = _tensors.collect(model).tensors
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        for entry in layer.state_dict():
            if entry != "bias":
                tensors.pop(prefix + entry, None)
        try:
            written = writer.write_layer(name, layer)
        except ValueError as error:
            raise ValueError(
                f"save: layer {name!r} cannot be written as {format_name!r}: {error}"
            ) from error
        tensors.update({prefix + entry: tensor for entry, tensor in written.items()})
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = writer.describe(layers, left)
    with new_folder(folder, overwrite=overwrite) as draft:
        _tensors.write(tensors, draft)
        if is_transformers_model(model):
            from pumice.integrations.transformers import save_config

            save_config(model, draft)
        _set_entry(draft / "config.json", "quantization_config", config)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)


def _set_entry(path: Path, name: str, value: Any) -> None:
    """Set one entry of a JSON file, which is made if it is not there."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stored[name] = value
    path.write_text(json.dumps(stored, indent=2), encoding="utf-8")
