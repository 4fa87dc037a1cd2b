"""Save compressed models and load them again: safetensors beside a description in JSON.

A checkpoint is a folder:

- ``model.safetensors`` (or numbered parts and an index): the state dict, tied tensors once;
- ``pumice.json``: the format version, the recipes, each compressed layer's settings, the other
  names of tied tensors, length and SHA-256 of each tensor file, and the report;
- for transformers models ``config.json`` and ``generation_config.json``, with which
  ``from_pretrained`` opens the folder too (see :mod:`pumice.integrations.transformers`).

Checkpoints of other libraries are in :mod:`pumice.integrations.formats`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pumice import _tensors
from pumice._assign import adopt, check_skeleton
from pumice._files import new_folder
from pumice.integrations import is_transformers_model
from pumice.nn import CompressedLinear, layer_from_config
from pumice.nn._linear import complete_config
from pumice.nn._replace import find_linear, replace_modules
from pumice.quantize import recipe_from_dict
from pumice.report import Report, attach_report, find_report

DESCRIPTION = "pumice.json"
FORMAT_VERSION = 1
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def is_checkpoint(folder: str | Path) -> bool:
    """Whether :func:`save` wrote that folder."""
    return (Path(folder) / DESCRIPTION).is_file()


def layer_configs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The settings of every compressed layer of a model, by qualified name."""
    return {
        name: module.config()
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear)
    }


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    format: str = "pumice",
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a model to a folder, which appears complete or not at all.

    Args:
        model: compressed by pumice; a transformers model's configuration is saved with it.
        folder: new or empty, unless ``overwrite``; parents are created.
        format: "pumice", or that of another library, with its ``quantization_config`` in
            ``config.json``: "gptq", "gptq_v2", "awq" or "compressed-tensors" (see
            :mod:`pumice.integrations.formats`). The bits of the weights are moved, never rounded;
            the report is not stored.
        tokenizer: saved along (its ``save_pretrained`` is called).
        overwrite: replace an existing folder; files in it that are not part of a checkpoint stay.

    Raises:
        FileExistsError: ``folder`` is a file, or is not empty and ``overwrite`` is False.
        OSError: it cannot be written.
        ValueError: something in the state dict is no tensor or has no data; a layer for which the
            other library's format has no place; an unknown format. The culprit is named.
        ImportError: safetensors is not installed.
    """
    from pumice import __version__

    if format != "pumice":
        from pumice.integrations import formats

        formats.save(model, Path(folder), format, tokenizer=tokenizer, overwrite=overwrite)
        return
    _tensors.require_safetensors()
    stored = _tensors.collect(model)
    report = find_report(model)
    description = {
        "format": "pumice",
        "format_version": FORMAT_VERSION,
        "pumice_version": __version__,
        "recipes": report.recipes if report else [],
        "layers": layer_configs(model),
        "tied": stored.tied,
        "buffer_dtypes": _transient_buffer_dtypes(model),
        "report": report.to_dict() if report else None,
    }
    with new_folder(Path(folder), overwrite=overwrite) as draft:
        description["files"] = _tensors.write(stored.tensors, draft)
        if is_transformers_model(model):
            from pumice.integrations.transformers import save_config

            save_config(model, draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        (draft / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def load(
    folder: str | Path | Mapping[str, Any],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    verify: bool = True,
    quantization_config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a checkpoint written by :func:`save`, or by another library, bit for bit.

    Args:
        folder: the checkpoint: of pumice, or of GPTQ, AWQ or compressed-tensors, known by the
            ``quantization_config`` in its ``config.json`` (see
            :mod:`pumice.integrations.formats`). Or a state dict in one of these three formats, with
            ``model`` and ``quantization_config``.
        model: an uncompressed model of the same architecture and dtype to load into; its linear
            layers are replaced as the checkpoint says. It may be on "meta", so that no memory is
            spent on weights to be replaced. Changed in place, and left as it was on any error.
            Without it, a transformers model is built from ``config.json``.
        device: where to put the model; by default where it is, and the CPU for what is on "meta".
        verify: compare the SHA-256 of the tensor files with the one stored (about 1 s a GB).
            Lengths, names, shapes and dtypes are always checked. Other libraries store no digest.
        quantization_config: the description of a state dict, or of a folder that has none: what
            would stand in ``config.json``, e.g. ``{"quant_method": "gptq", "bits": 4,
            "group_size": 128}``.

    Returns:
        The model (a bare ``nn.Linear`` has no parent: then its replacement). A transformers model
        built here is in evaluation mode.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a truncated or changed file; a missing, unexpected or ill-shaped tensor; an
            unknown format version, recipe, layer type, bit width or other setting; a zero point or
            group that is out of range; a pickle. The culprit is named.
        TypeError: a state dict without ``model`` and ``quantization_config``.
        ImportError: safetensors, or transformers, is not installed.
    """
    if isinstance(folder, Mapping):
        if model is None or quantization_config is None:
            raise TypeError(
                "load: a state dict needs the model to load into and its quantization_config: "
                "pumice.load(state_dict, model, quantization_config={...})"
            )
        from pumice.integrations import formats

        return formats.load_state_dict(model, folder, quantization_config, device)
    folder = Path(folder)
    if not is_checkpoint(folder):
        from pumice.integrations import formats

        config = quantization_config or formats.find_config(folder)
        if config is not None:
            return formats.load_folder(folder, config, model, device)
    stored = read_description(folder)
    report = stored.report
    _tensors.require_safetensors()
    _tensors.check_files(folder, stored.files, verify=verify)
    built_here = model is None
    if model is None:
        from pumice.integrations.transformers import build_skeleton

        model = build_skeleton(folder)
    replacements = _make_layers(model, stored.layers)
    with _tensors.opened(folder, list(stored.files)) as tensors:
        plan = check_skeleton(
            model, replacements, tensors, stored.tied, check_dtypes=not built_here
        )
        model = replace_modules(model, replacements)
        adopt(model, plan, tensors, stored.buffer_dtypes, torch.device(device or "cpu"))
    if device is not None:
        model = model.to(device)
    if report is not None:
        attach_report(model, report)
    return model


@dataclass(frozen=True)
class Description:
    """The contents of pumice.json, checked."""

    layers: dict[str, dict[str, Any]]
    tied: dict[str, str]
    buffer_dtypes: dict[str, str]
    files: dict[str, dict[str, Any]]
    report: Report | None


def read_description(folder: Path) -> Description:
    """Read and check pumice.json; ValueError, naming the file, for anything unknown in it."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise not_a_checkpoint(folder)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(stored, dict) or stored.get("format") != "pumice":
        raise ValueError(f"{path} is not the description of a pumice checkpoint")
    version = stored.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r} (written by pumice "
            f"{stored.get('pumice_version')}); this version of pumice reads {FORMAT_VERSION}"
        )
    try:
        for recipe in stored["recipes"]:
            recipe_from_dict(recipe)
        return Description(
            layers=dict(stored["layers"]),
            tied=dict(stored["tied"]),
            buffer_dtypes=dict(stored["buffer_dtypes"]),
            files={
                name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
                for name, entry in stored["files"].items()
            },
            report=Report.from_dict(stored["report"]) if stored["report"] else None,
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the entry {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def not_a_checkpoint(path: Path) -> Exception:
    """Why there is nothing to load at a path."""
    pickles = [path] if path.suffix in _PICKLES else []
    if path.is_dir():
        pickles = [file for file in sorted(path.iterdir()) if file.suffix in _PICKLES]
    if pickles and pickles[0].exists():
        return ValueError(
            f"{pickles[0]} is a pickle, which can run any code when it is opened: pumice does not "
            "load pickles, only safetensors files"
        )
    if not path.exists():
        return FileNotFoundError(f"{path} does not exist")
    return FileNotFoundError(
        f"{path} is no pumice checkpoint: it holds no {DESCRIPTION}; nor is it one of another "
        "library's quantized models: there is no quantization_config in a config.json"
    )


def _make_layers(
    model: nn.Module, configs: dict[str, dict[str, Any]]
) -> dict[str, CompressedLinear]:
    """The layers that the checkpoint holds, on "meta", checked against those they replace."""
    layers = {}
    for name, config in configs.items():
        if _has_layer(model, name, config):
            continue
        linear = find_linear(model, name)
        for argument in ("in_features", "out_features"):
            if config.get(argument) != getattr(linear, argument):
                raise ValueError(
                    f"layer {name!r} has {argument} = {config.get(argument)} in the checkpoint, "
                    f"but {getattr(linear, argument)} in the model"
                )
        if config.get("bias") != (linear.bias is not None):
            raise ValueError(
                f"layer {name!r} has {'a' if config.get('bias') else 'no'} bias in the checkpoint, "
                f"unlike the model"
            )
        dtype = linear.weight.dtype if linear.bias is None else linear.bias.dtype
        try:
            layer = layer_from_config(config, device="meta", dtype=dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        layers[name] = layer.train(linear.training)
    return layers


def _has_layer(model: nn.Module, name: str, config: dict[str, Any]) -> bool:
    """Whether the model already holds that compressed layer; ValueError if with other settings."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False  # find_linear will say so
    if not isinstance(module, CompressedLinear):
        return False
    if module.config() != complete_config(config):
        raise ValueError(
            f"layer {name!r} is compressed already, with {module.config()}, but the checkpoint "
            f"holds {config}"
        )
    return True


def _transient_buffer_dtypes(model: nn.Module) -> dict[str, str]:
    """Dtypes of the floating-point buffers that are not in the state dict, such as a rotary table.

    A new model computes them afresh, in the dtype of its making; the saved one may have been cast.
    """
    saved = model.state_dict().keys()
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name not in saved and buffer.is_floating_point()
    }
