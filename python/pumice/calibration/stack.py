"""The repeated blocks of a model: what calibration goes through one at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Stack:
    """Consecutive blocks of a model, by qualified name.

    Attributes:
        name: of the module that holds them.
        blocks: the blocks in the order they run. One block named "" is the model as a whole.
    """

    name: str
    blocks: dict[str, nn.Module]

    @property
    def is_whole_model(self) -> bool:
        return list(self.blocks) == [""]


def find_stack(model: nn.Module, blocks: str | None = None) -> Stack:
    """The stack of repeated blocks that holds most of the model's linear weights.

    A stack is an ``nn.ModuleList`` or ``nn.Sequential`` of at least two distinct modules of one
    class, with linear layers inside. A model without one is taken as a single block.

    Args:
        model: any model.
        blocks: the qualified name of the stack instead; "" for the model as a whole.

    Raises:
        ValueError: ``blocks`` names no such stack.
    """
    if blocks is not None and blocks != "":
        try:
            holder = model.get_submodule(blocks)
        except AttributeError:
            raise ValueError(f"blocks: {type(model).__name__} has no module {blocks!r}") from None
        if not _is_stack(holder):
            raise ValueError(
                f"blocks: {blocks!r} is a {type(holder).__name__}, not a ModuleList or Sequential "
                "of at least two different modules of one class that hold linear layers"
            )
        return _stack(blocks, holder)
    if blocks is None:
        candidates = {name: m for name, m in model.named_modules() if _is_stack(m)}
        if candidates:
            name = max(candidates, key=lambda name: _linear_weights(candidates[name]))
            return _stack(name, candidates[name])
    return Stack("", {"": model})


def _stack(name: str, holder: nn.Module) -> Stack:
    prefix = f"{name}." if name else ""
    return Stack(name, {f"{prefix}{key}": block for key, block in holder.named_children()})


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    children = list(module.children())  # each module once
    return (
        len(children) >= 2
        and len(children) == len(module)
        and len({type(child) for child in children}) == 1
        # A Sequential of plain linear layers has no blocks: they are the layers.
        and not isinstance(children[0], nn.Linear)
        and all(_linear_weights(child) for child in children)
    )


def _linear_weights(module: nn.Module) -> int:
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
