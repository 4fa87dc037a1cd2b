"""Calibrated compression, one block of the model after the other.

For each block: a working copy goes to the device that computes; the methods gather what they need
of its layers' inputs and change it; the outputs of the *changed* block become the next block's
inputs, so that later blocks can make up for what earlier ones lost. The model itself is only read.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pumice._calibrate import evaluation_mode
from pumice.calibration.block import Block
from pumice.calibration.comm import is_distributed, same_everywhere, sum_number
from pumice.calibration.inputs import BlockInputs, capture
from pumice.calibration.resume import Journal
from pumice.calibration.stack import find_stack


@dataclass(frozen=True)
class Settings:
    """How a calibration runs; none of it changes the result, save rounding.

    Attributes:
        blocks: the stack of repeated blocks, see :func:`find_stack`.
        device: where blocks compute; by default where each of them is.
        offload: keep the activations between blocks in the memory of the CPU.
        resume: a folder that finished blocks are written to, and read from when the run is
            repeated after it was interrupted.
    """

    blocks: str | None = None
    device: torch.device | str | None = None
    offload: bool = False
    resume: str | Path | None = None


class Stage(ABC):
    """A step of a method, done to each block in turn."""

    @abstractmethod
    def process(self, block: Block) -> None:
        """Change the block, and hand over what replaces its modules."""


@dataclass
class Outcome:
    """Replacements by qualified name, and the relative output error of compressed layers."""

    replacements: dict[str, nn.Module] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


# The error of each layer is measured on this many samples.
_MEASURED_SAMPLES = 4


def run(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    calibration: Iterable[Any],
    stages: Sequence[Stage],
    outside: Callable[[str, nn.Linear], nn.Module],
    *,
    settings: Settings,
    fingerprint: Mapping[str, Any],
    progress: Callable[[int, int, str], None],
) -> Outcome:
    """Compress the given layers of a model.

    Args:
        model: left as it is.
        layers: what to compress, by qualified name.
        calibration: see :func:`pumice.compress`; of a distributed run, this process's share.
        stages: done to each block in order; together they must replace every layer in it.
        outside: the replacement of a layer that is in no block, from its name and itself.
        settings: how to run.
        fingerprint: what must be equal in a run to be resumed, as plain values.
        progress: called with (layers done, layers in all, name).

    Raises:
        ValueError: the calibration data or the model do not allow it; the layer is named.
    """
    stack = find_stack(model, settings.blocks)
    inside = {name: _layers_within(name, layers) for name in stack.blocks}
    last = max((i for i, found in enumerate(inside.values()) if found), default=-1)
    outcome = Outcome()
    done = 0

    def report(name: str) -> None:
        nonlocal done
        done += 1
        progress(done, len(layers), name)

    modes = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad(), evaluation_mode(model):
        inputs = BlockInputs()
        if last >= 0:
            inputs = capture(
                model, stack, calibration, torch.device("cpu") if settings.offload else None
            )
        journal = Journal.open(settings.resume, list(stack.blocks), inputs, fingerprint)
        for index, (name, module) in enumerate(stack.blocks.items()):
            if index > last:
                break
            block = _working_copy(name, index, module, inside[name], inputs, settings.device)
            if journal.holds(index):
                errors = journal.restore(index, module, block)
                if index < last:
                    block.advance()
            else:
                _process(block, stages)
                errors = _advance(block, is_last=index == last)
                journal.record(index, module, block, errors)
            home = next(module.parameters()).device
            for local, new in block.replacements.items():
                full_name = block.full_name(local)
                outcome.replacements[full_name] = new.to(home).train(modes[full_name])
            for local in block.layers:
                outcome.errors[block.full_name(local)] = errors[local]
                report(block.full_name(local))
    found = {name for names in inside.values() for name in names}
    for name in [name for name in layers if name not in found]:
        outcome.replacements[name] = outside(name, layers[name])
        report(name)
    return outcome


def _layers_within(block: str, layers: Mapping[str, nn.Linear]) -> list[str]:
    return [name for name in layers if not block or name.startswith(f"{block}.")]


def _working_copy(
    name: str,
    index: int,
    module: nn.Module,
    layer_names: Sequence[str],
    inputs: BlockInputs,
    device: torch.device | str | None,
) -> Block:
    where = next(module.parameters()).device if device is None else torch.device(device)
    working = copy.deepcopy(module).to(where)
    layers: dict[str, nn.Linear] = {}
    for full_name in layer_names:
        local = full_name[len(name) + 1 :] if name else full_name
        linear = working.get_submodule(local)
        assert isinstance(linear, nn.Linear)
        layers[local] = linear
    return Block(name, index, working, layers, inputs, where)


def _process(block: Block, stages: Sequence[Stage]) -> None:
    if not block.layers:
        return
    for stage in stages:
        stage.process(block)
    missing = [name for name in block.layers if name not in block.replacements]
    if missing:
        raise RuntimeError(f"no stage has compressed {', '.join(map(block.full_name, missing))}")
    if is_distributed():
        for name, new in block.replacements.items():
            for tensor in [*new.parameters(), *new.buffers()]:
                same_everywhere(tensor)
            if name in block.layers:
                block.use(name)


def _advance(block: Block, *, is_last: bool) -> dict[str, float]:
    """Run the changed block; returns ‖y' - y‖ / ‖y‖ of each compressed layer.

    y is the layer's output with its weight as it was before rounding, y' the one with the rounded
    weight, both on the input that the layer gets in the compressed model.
    """
    sums = {name: [0.0, 0.0] for name in block.layers}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(linear: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
            exact = nn.functional.linear(args[0], block.float_weights[name], linear.bias)
            sums[name][0] += float((output.double() - exact.double()).square().sum())
            sums[name][1] += float(exact.double().square().sum())

        return hook

    handles = [linear.register_forward_hook(hook_of(name)) for name, linear in block.layers.items()]
    try:
        block.advance(0, _MEASURED_SAMPLES, keep=not is_last)
    finally:
        for handle in handles:
            handle.remove()
    if not is_last:
        block.advance(_MEASURED_SAMPLES)
    errors = {}
    for name, (error, norm) in sums.items():
        error, norm = sum_number(error), sum_number(norm)
        errors[name] = math.sqrt(error / norm) if norm else (0.0 if error == 0.0 else math.inf)
    return errors
