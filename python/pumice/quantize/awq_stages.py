"""The two searches of AWQ, as stages of a calibrated run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from pumice.calibration import Block, DiagonalBlocks, MeanAbs, SharedInput, Stage
from pumice.calibration.comm import sum_over_processes
from pumice.calibration.inputs import output_of
from pumice.quantize.fold import Fold, FoldFinder
from pumice.quantize.grid import Grid, expand, group_length

# The largest weight of a group is tried at 1, 0.95, … 0.55 times itself.
_CLIP_STEPS = 20
_CLIP_SHRINK = 0.5

# Layers whose outputs meet in products of queries and keys, by the last part of their names.
_QUERY_OR_KEY = ("q_proj", "k_proj", "query", "key", "query_key_value", "qkv", "Wqkv", "qkv_proj")


class ScaleStage(Stage):
    """Find the scales of a block's inputs and fold them in; see :class:`pumice.AWQScaling`."""

    def __init__(self, rounding: Grid, group_size: int, steps: int, tokens: int) -> None:
        self._rounding = rounding
        self._group_size = group_size
        self._steps = steps
        self._tokens = tokens
        self._folds = FoldFinder()

    def process(self, block: Block) -> None:
        shared = block.collect(lambda _, linear: MeanAbs(linear.in_features, block.device))
        chosen: list[tuple[Fold, Tensor]] = []
        for group in shared:
            with block.naming(group.names[0]):
                _check_inputs(group.statistic.value)
            fold = self._folds.find(block, group.names)
            if fold is not None:
                chosen.append((fold, self.search(block, group, fold)))
        # Applied in the end: every search sees the block as it was.
        for fold, scale in chosen:
            fold.apply(block.module, scale)
            block.touch(fold.producer, *fold.consumers)

    def search(self, block: Block, group: SharedInput[MeanAbs], fold: Fold) -> Tensor:
        """The best scale, fp32, one for each output of the fold's producer."""
        mean = group.statistic.value
        calls = _record_calls(block, _common_module(group.names), self._tokens)
        candidates = [scale_of(fold.tied(mean), step / self._steps) for step in range(self._steps)]
        losses = torch.zeros(len(candidates), dtype=torch.float64, device=block.device)
        linears = [block.layers[name] for name in group.names]
        originals = [linear.weight.detach().clone() for linear in linears]
        module = block.module.get_submodule(_common_module(group.names))
        try:
            for index, scale in enumerate(candidates):
                wide = fold.spread(scale)
                for linear, original in zip(linears, originals, strict=True):
                    scaled = original.float() * wide
                    rounded = self._rounding.round_trip(scaled, self._group_size) / wide
                    linear.weight.copy_(rounded)
                losses[index] = sum(call.loss(module, block.name) for call in calls)
        finally:
            for linear, original in zip(linears, originals, strict=True):
                linear.weight.copy_(original)
        sum_over_processes(losses)
        return candidates[int(losses.nan_to_num(float("inf")).argmin())]


class ClipStage(Stage):
    """Clip the weights of each group to the range that changes the layer's output least.

    With the error δ of a group's rounded weights and H the block of the Hessian that belongs to its
    columns, the group's share of the output changes by δ H δᵀ: no activations need to be kept.
    """

    def __init__(self, rounding: Grid, group_size: int) -> None:
        self._rounding = rounding
        self._group_size = group_size

    def process(self, block: Block) -> None:
        def make(_: str, linear: nn.Linear) -> DiagonalBlocks:
            size = group_length(self._group_size, linear.in_features)
            return DiagonalBlocks(linear.in_features, size, block.device)

        for group in block.collect(make):
            hessian = group.statistic.value
            with block.naming(group.names[0]):
                _check_inputs(hessian)
            for name in group.names:
                if name.rpartition(".")[2] not in _QUERY_OR_KEY:
                    weight = block.layers[name].weight
                    weight.copy_(clip(weight.float(), hessian, self._rounding, self._group_size))


def _check_inputs(statistic: Tensor) -> None:
    if not bool(statistic.isfinite().all()):
        raise ValueError("its calibration inputs hold NaN or infinite values")


def scale_of(mean_abs: Tensor, alpha: float) -> Tensor:
    """s = (mean |x|)^α / √(max s · min s)."""
    scale = mean_abs.pow(alpha).clamp_(min=1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def clip(weight: Tensor, hessian: Tensor, rounding: Grid, group_size: int) -> Tensor:
    """The weight [N, K] with each group clipped to its best range.

    Args:
        weight: fp32.
        hessian: fp32 [G, g, g], see :class:`DiagonalBlocks`.
        rounding: what the clipped weight is rounded with.
        group_size: or -1.
    """
    k = weight.shape[1]
    size = group_length(group_size, k)
    groups = nn.functional.pad(weight, (0, -k % size)).unflatten(1, (-1, size)).transpose(0, 1)
    largest = groups.abs().amax(2, keepdim=True)  # [G, N, 1]
    best_error = torch.full_like(largest, float("inf"))
    best = largest
    for step in range(int(_CLIP_SHRINK * _CLIP_STEPS)):
        limit = largest * (1 - step / _CLIP_STEPS)
        clipped = groups.clamp(-limit, limit)
        scale, zero = (t.unsqueeze(2) for t in rounding.fit(clipped))
        delta = rounding.quantize(clipped, scale, zero).sub_(zero).mul_(scale).sub_(groups)
        error = torch.bmm(delta, hessian).mul_(delta).sum(2, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, limit, best)
    limits = expand(best.squeeze(2).T, size, k)
    return weight.clamp(-limits, limits)


@dataclass
class _RecordedCall:
    """A call of a module of the block, and what it returned before anything was changed."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor = field(repr=False)

    def loss(self, module: nn.Module, name: str) -> float:
        output = output_of(module(*self.args, **self.kwargs), name)
        return float((output.float() - self.output.float()).square().sum(dtype=torch.float64))


def _record_calls(block: Block, name: str, tokens: int) -> list[_RecordedCall]:
    """Calls of a module of the block, of whole samples until there are ``tokens`` tokens."""
    calls: list[_RecordedCall] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_RecordedCall(args, kwargs, output_of(output, block.full_name(name))))

    handle = block.module.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        for sample in range(len(block.inputs)):
            block.run(sample)
            if sum(call.output.numel() // call.output.shape[-1] for call in calls) >= tokens:
                break
    finally:
        handle.remove()
    return calls


def _common_module(names: Sequence[str]) -> str:
    """The smallest module that holds all of the layers; a single layer is that itself."""
    if len(names) == 1:
        return names[0]
    parts = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, parts))
