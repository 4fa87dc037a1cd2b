"""Which linear layers of a model are to be compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from pumice.ops._checks import FLOATING

Predicate = Callable[[str, nn.Module], bool]
Selection = str | Iterable[str] | Predicate

# Output embeddings by their usual names. Besides, whatever a transformers model calls its output
# embedding is left as it is while `exclude` has this value.
DEFAULT_EXCLUDE: tuple[str, ...] = ("lm_head", "embed_out")


@dataclass
class Targets:
    """The layers to compress and those left, with the reason, by qualified name."""

    layers: dict[str, nn.Linear] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def as_predicate(argument: str, selection: Selection) -> Predicate:
    """A selection as a function of name and module.

    Patterns are those of :mod:`fnmatch`, and are tried on the qualified name and on its last part.
    """
    if callable(selection):
        return selection
    patterns = [selection] if isinstance(selection, str) else list(selection)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"compress: {argument} must be name patterns or a function (name, module) -> bool, "
                f"but it holds {pattern!r}"
            )

    def matches(name: str, module: nn.Module) -> bool:
        last = name.rpartition(".")[2]
        return any(fnmatchcase(name, p) or fnmatchcase(last, p) for p in patterns)

    return matches


def find_targets(
    model: nn.Module, include: Selection | None, exclude: Selection = DEFAULT_EXCLUDE
) -> Targets:
    """Choose the linear layers of a model.

    Raises:
        ValueError: the model has no linear layer, or none is chosen; the message says why.
    """
    included = as_predicate("include", include) if include is not None else None
    excluded = as_predicate("exclude", exclude)
    output = _output_embedding(model) if exclude is DEFAULT_EXCLUDE else None
    targets = Targets()
    any_linear = False
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        any_linear = True
        if included is not None and not included(name, module):
            continue
        if module is output or excluded(name, module):
            targets.skipped[name] = "excluded"
        elif (reason := _unsuitable(module)) is not None:
            targets.skipped[name] = reason
        else:
            targets.layers[name] = module
    _drop_shared_weights(model, targets)
    if not any_linear:
        raise ValueError(
            f"compress: {type(model).__name__} holds no nn.Linear that is still uncompressed"
            + _other_kinds(model)
        )
    if not targets.layers:
        raise ValueError(
            f"compress: no linear layer is chosen: {_why_none(targets, include)}"
            + _other_kinds(model)
        )
    return targets


def _other_kinds(model: nn.Module) -> str:
    """GPT-2's layers look like linear ones to its users."""
    kinds = {type(module).__name__ for module in model.modules()} & {"Conv1D"}
    return ". Conv1D (of transformers) is no nn.Linear and is not compressed" if kinds else ""


def _why_none(targets: Targets, include: Selection | None) -> str:
    if not targets.skipped:
        return f"include={include!r} matches none"
    listed = [f"{name or 'the model'}: {why}" for name, why in list(targets.skipped.items())[:5]]
    more = len(targets.skipped) - len(listed)
    return "; ".join(listed) + (f"; and {more} more" if more else "")


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get_output_embeddings = getattr(model, "get_output_embeddings", None)
    if not callable(get_output_embeddings):
        return None
    try:
        module = get_output_embeddings()
    except (AttributeError, NotImplementedError):  # a model without a language-modelling head
        return None
    return module if isinstance(module, nn.Module) else None


def _unsuitable(linear: nn.Linear) -> str | None:
    """Why a layer cannot be replaced, or None."""
    if isinstance(linear, LazyModuleMixin) and linear.has_uninitialized_params():
        return "not yet initialized (LazyLinear)"
    if type(linear).forward is not nn.Linear.forward:
        return f"{type(linear).__name__} has a forward of its own"
    if "forward" in vars(linear):
        return "its forward was replaced on the instance, as accelerate does to dispatch a model"
    # nn.MultiheadAttention reads the weight of its out_proj itself and never calls it.
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weight directly"
    if "weight" not in linear._parameters:
        return "its weight is computed by a parametrization; remove that first"
    if linear.weight.dtype not in FLOATING:
        return f"its weight is {linear.weight.dtype}, not float32, float16 or bfloat16"
    return None


def _drop_shared_weights(model: nn.Module, targets: Targets) -> None:
    """Leave layers whose weight another module needs, such as an embedding tied to the output.

    Nothing would be saved, and the two would part.
    """
    chosen = {id(linear) for linear in targets.layers.values()}
    needed = {
        id(parameter)
        for module in model.modules()
        if id(module) not in chosen
        for parameter in module._parameters.values()
        if parameter is not None
    }
    for name, linear in list(targets.layers.items()):
        if id(linear.weight) in needed:
            del targets.layers[name]
            targets.skipped[name] = "its weight is tied to another module"
