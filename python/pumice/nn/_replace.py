"""Put other modules in the place of a model's linear layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def find_linear(model: nn.Module, name: str) -> nn.Linear:
    """The nn.Linear of that qualified name ("" for the model itself)."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no module {name!r}, which the checkpoint holds"
        ) from None
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"{type(model).__name__}.{name} is a {type(module).__name__}, but the checkpoint holds "
            "a compressed nn.Linear under that name"
        )
    return module


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Replace modules by qualified name, wherever the same module stands; returns the model.

    The model itself has the name "": then its replacement is returned, for nothing holds it.
    """
    if "" in replacements:
        return replacements[""]
    by_identity = {id(model.get_submodule(name)): new for name, new in replacements.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in by_identity:
                parent._modules[name] = by_identity[id(child)]
    leave_fused_paths(model)
    return model


def leave_fused_paths(model: nn.Module) -> None:
    """Turn off torch's fused encoder layer where its linear layers were replaced.

    In evaluation nn.TransformerEncoderLayer hands the weights of its linear layers to one fused
    kernel, past their forward. The switches below are the ones its own constructor sets for an
    activation without a fused kernel.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not _is_fusible(module):
            module.activation_relu_or_gelu = 0
    for module in model.modules():
        # The stack packs padded sequences into nested tensors for that kernel alone.
        if isinstance(module, nn.TransformerEncoder) and not all(map(_is_fusible, module.layers)):
            module.use_nested_tensor = False


def _is_fusible(layer: nn.Module) -> bool:
    linears = [getattr(layer, name, None) for name in ("linear1", "linear2")]
    return all(isinstance(linear, nn.Linear) for linear in linears)
