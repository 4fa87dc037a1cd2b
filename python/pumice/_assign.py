"""Fill a model with stored tensors: first check everything, then change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pumice.nn import CompressedLinear

# For each name of the model's state dict, the stored name whose tensor it gets.
Plan = dict[str, str]


class TensorSource(Protocol):
    """Stored tensors by name: an open checkpoint, or a state dict in memory."""

    def names(self) -> set[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> Tensor: ...


class StateDictSource:
    """A state dict in memory as a source; what is no tensor is left out."""

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self._tensors = {name: t for name, t in state_dict.items() if isinstance(t, Tensor)}

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def check_skeleton(
    model: nn.Module,
    replacements: Mapping[str, nn.Module],
    stored: TensorSource,
    tied: Mapping[str, str],
    *,
    check_dtypes: bool,
) -> Plan:
    """Match the stored tensors with the model as it will be after the replacements.

    Raises:
        ValueError: a tensor missing, unexpected, of another shape or dtype; one that the model ties
            to another while the two differ in the checkpoint; a buffer without data; values that a
            compressed layer refuses.
    """
    expected = _expected_state(model, replacements)
    plan = _plan(expected, stored.names(), tied)
    missing = sorted(name for name, source in plan.items() if source not in stored.names())
    unexpected = sorted((stored.names() | tied.keys()) - expected.keys())
    if missing or unexpected:
        raise ValueError(
            "the checkpoint does not fit the model: "
            + "; ".join(
                f"{len(names)} {kind} tensors ({', '.join(names[:5])}{', …' * (len(names) > 5)})"
                for kind, names in (("missing", missing), ("unexpected", unexpected))
                if names
            )
        )
    for name, source in plan.items():
        target = expected[name]
        if stored.shape(source) != tuple(target.shape):
            raise ValueError(
                f"tensor {name!r} has shape {list(stored.shape(source))} in the checkpoint, but "
                f"{list(target.shape)} in the model"
            )
        if check_dtypes and stored.dtype(source) != target.dtype:
            raise ValueError(
                f"tensor {name!r} is {stored.dtype(source)} in the checkpoint, but {target.dtype} "
                f"in the model; convert the model first: model.to({stored.dtype(source)})"
            )
    _check_ties(expected, plan, stored)
    _check_no_lost_buffers(model, expected)
    _check_values(model, replacements, plan, stored)
    return plan


def _plan(expected: Mapping[str, Tensor], names: set[str], tied: Mapping[str, str]) -> Plan:
    plan = {name: tied.get(name, name) for name in expected}
    # Of tensors that the model ties, one name in the checkpoint is enough.
    stored_name = {id(expected[name]): source for name, source in plan.items() if source in names}
    for name, source in plan.items():
        if source not in names:
            plan[name] = stored_name.get(id(expected[name]), source)
    return plan


def _expected_state(model: nn.Module, replacements: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The state dict that the model will have, without changing it."""
    by_identity = {id(model.get_submodule(name)): new for name, new in replacements.items()}
    state: dict[str, Tensor] = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
    for name, module in model.named_modules(remove_duplicate=False):
        new = by_identity.get(id(module))
        if new is None:
            continue
        prefix = f"{name}." if name else ""
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]
        new.state_dict(destination=state, prefix=prefix, keep_vars=True)
    return state


def _check_ties(expected: Mapping[str, Tensor], plan: Plan, stored: TensorSource) -> None:
    """One tensor of the model under two names can hold only one value."""
    source_of: dict[int, str] = {}
    for name, target in expected.items():
        source = plan[name]
        first = source_of.setdefault(id(target), source)
        if first != source and not torch.equal(stored.read(first), stored.read(source)):
            raise ValueError(
                f"the model ties {name!r} to {first!r}, but they differ in the checkpoint"
            )


def _check_values(
    model: nn.Module, replacements: Mapping[str, nn.Module], plan: Plan, stored: TensorSource
) -> None:
    """Let each compressed layer look at the values that its kernels will not look at."""
    for name, layer in {**dict(model.named_modules()), **replacements}.items():
        if not isinstance(layer, CompressedLinear):
            continue
        prefix = f"{name}." if name else ""
        sources = {key: plan[prefix + key] for key in layer.checked if prefix + key in plan}
        try:
            layer.check_values({key: stored.read(source) for key, source in sources.items()})
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error


def _check_no_lost_buffers(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    lost = [
        name
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.is_meta and name not in expected
    ]
    if lost:
        raise ValueError(
            f"the model is on 'meta', and its buffers {', '.join(lost[:5])} are not part of a "
            "state dict: nothing holds their values. Build it with real buffers, e.g. under "
            "accelerate.init_empty_weights(include_buffers=False)"
        )


def adopt(
    model: nn.Module,
    plan: Plan,
    stored: TensorSource,
    buffer_dtypes: Mapping[str, str],
    device: torch.device,
) -> None:
    """Give the model its tensors, one at a time; what has memory keeps it, and its ties."""
    dtypes = {name: stored.dtype(source) for name, source in plan.items()}
    _materialize(model, dtypes, device)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, buffer in module._buffers.items():
            name = f"{prefix}.{key}" if prefix else key
            if buffer is not None and name in buffer_dtypes and name not in plan:
                module._buffers[key] = buffer.to(getattr(torch, buffer_dtypes[name]))
    state: dict[str, Any] = model.state_dict()
    with torch.no_grad():
        for name, source in plan.items():
            state[name].copy_(stored.read(source))


def _materialize(model: nn.Module, dtypes: Mapping[str, torch.dtype], device: torch.device) -> None:
    """Give memory to what is on "meta", or of a dtype other than the stored one."""
    made: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for entries in (module._parameters, module._buffers):
            for key, tensor in list(entries.items()):
                if tensor is None:
                    continue
                dtype = dtypes.get(f"{prefix}.{key}" if prefix else key, tensor.dtype)
                if not tensor.is_meta and tensor.dtype == dtype:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _empty_like(tensor, dtype, device)
                entries[key] = made[id(tensor)]


def _empty_like(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, dtype=dtype, device=device if tensor.is_meta else None)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, tensor.requires_grad)
    return empty
