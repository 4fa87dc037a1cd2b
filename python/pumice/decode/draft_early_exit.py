"""The first layers of a model as its own draft.

The target's embedding, its first n layers, its last norm and its head, all shared: no weight is
stored twice. Models trained for it (LayerSkip, Elhoushi et al., 2024, arXiv:2404.16710) predict
well from a middle layer; others are poor at it, since their middle layers speak another language
than the head reads.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from pumice.decode.draft_model import ModelDraft
from pumice.decode.gamma import AdaptiveGamma

__all__ = ["EarlyExitDraft", "early_exit"]


class EarlyExitDraft(ModelDraft):
    """A :class:`~pumice.decode.ModelDraft` of the target's first ``num_layers`` layers.

    ``options``: those of ModelDraft. Keys and values of these layers are kept twice, in the
    target's cache and the draft's own.
    """

    def __init__(
        self,
        model: nn.Module,
        num_layers: int,
        gamma: int | AdaptiveGamma = 4,
        **options: Any,
    ) -> None:
        super().__init__(early_exit(model, num_layers), gamma, **options)
        self.num_layers = num_layers


def early_exit(model: nn.Module, num_layers: int) -> nn.Module:
    """A model of the first layers of another, all modules shared but those that hold the layers.

    Raises ValueError where there is no list of layers, or it has no more than ``num_layers``.
    """
    name, layers = _layers(model)
    if not 1 <= num_layers < len(layers):
        raise ValueError(
            f"early_exit: num_layers must be in [1, {len(layers) - 1}], not {num_layers}: "
            f"{type(model).__name__} has {len(layers)} layers"
        )
    config = _shortened(getattr(model, "config", None), num_layers, len(layers))
    *path, last = name.split(".")
    top = holder = _shallow(model, config)
    for step in path:
        child = _shallow(getattr(holder, step), config)
        setattr(holder, step, child)
        holder = child
    setattr(holder, last, nn.ModuleList(layers[:num_layers]))
    return top


def _layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The list of modules that holds most of the parameters, and its qualified name."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, nn.ModuleList) and len(module) > 1
    }
    if not lists:
        raise ValueError(f"early_exit: {type(model).__name__} has no list of layers to stop in")
    name = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return name, list(lists[name])


def _shallow(module: nn.Module, config: Any) -> nn.Module:
    """The same module with the same children, whose children and config can be exchanged."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    if config is not None and "config" in twin.__dict__:
        twin.config = config
    return twin


def _shortened(config: Any, num_layers: int, of: int) -> Any:
    """A transformers configuration with fewer layers, also in its lists of one entry a layer."""
    if config is None:
        return None
    config = copy.deepcopy(config)
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if getattr(config, name, None) == of:
            setattr(config, name, num_layers)
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == of:
            setattr(config, name, value[:num_layers])
    return config
