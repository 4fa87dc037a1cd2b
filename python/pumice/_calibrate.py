"""Measure what compression does to each layer's output, on the inputs it really gets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Measurement:
    """Running sums over one layer's inputs; no activation is kept."""

    squared_error: float = 0.0
    squared_norm: float = 0.0
    calls: int = 0
    fractions: float = 0.0
    outliers: Tensor | None = None  # bool [K]: the column held an outlier in some input

    @property
    def relative_error(self) -> float | None:
        if not self.calls:
            return None
        if self.squared_norm == 0.0:
            return 0.0 if self.squared_error == 0.0 else float("inf")
        return float((self.squared_error / self.squared_norm) ** 0.5)

    @property
    def outlier_columns(self) -> int | None:
        return None if self.outliers is None else int(self.outliers.sum())

    @property
    def outlier_fraction(self) -> float | None:
        return None if self.outliers is None else self.fractions / self.calls

    def add(self, x: Tensor, y: Tensor, y_compressed: Tensor, threshold: float | None) -> None:
        self.calls += 1
        self.squared_error += float((y_compressed.double() - y.double()).square().sum())
        self.squared_norm += float(y.double().square().sum())
        if threshold is not None:
            # Negated, as in the kernels: NaN counts as an outlier.
            found = (~(x.abs() < threshold)).reshape(-1, x.shape[-1]).any(0)
            self.fractions += float(found.double().mean())
            self.outliers = found if self.outliers is None else self.outliers | found


def measure(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    replacements: Mapping[str, nn.Module],
    calibration: Iterable[Any],
    threshold: float | None,
) -> dict[str, Measurement]:
    """Run the uncompressed model on the calibration inputs and compare layer by layer.

    Every layer sees the input that the uncompressed model gives it, so errors do not add up along
    the depth. The model runs in evaluation mode, without gradients; its mode is restored.
    """
    measurements = {name: Measurement() for name in layers}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0]
            measurements[name].add(x, output, replacements[name](x), threshold)

        return hook

    handles = [linear.register_forward_hook(hook_of(name)) for name, linear in layers.items()]
    count = 0
    try:
        with torch.no_grad(), evaluation_mode(model):
            for sample in calibration:
                call(model, sample)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError("compress: calibration is empty; pass at least one input, or None")
    return measurements


def call(model: nn.Module, sample: Any) -> Any:
    """Call a model with one calibration input: a tensor, a tuple or list, or a dict of keywords."""
    if isinstance(sample, Tensor):
        return model(sample)
    if isinstance(sample, Mapping):
        return model(**sample)
    if isinstance(sample, (tuple, list)):
        return model(*sample)
    raise not_a_sample(sample)


def not_a_sample(sample: Any) -> TypeError:
    return TypeError(
        "compress: calibration must yield tensors, tuples of arguments or dicts of keyword "
        f"arguments, not {type(sample).__name__}"
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time being; afterwards each module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
