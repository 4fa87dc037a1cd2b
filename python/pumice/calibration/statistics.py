"""What methods want to know of a layer's inputs, as running sums over all calibration tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from torch import Tensor

from pumice.calibration.comm import sum_number, sum_over_processes

Self = TypeVar("Self", bound="Statistic")


class Statistic(ABC):
    """A sum over the rows of the inputs that a layer gets."""

    def __init__(self) -> None:
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the rows of x [tokens, K]."""
        self.tokens += x.shape[0]
        self._add(x.float())

    def finish(self: Self) -> Self:
        """Called once at the end: sums over the processes of a distributed calibration."""
        self.tokens = int(sum_number(self.tokens))
        self._reduce()
        return self

    @abstractmethod
    def _add(self, x: Tensor) -> None: ...

    @abstractmethod
    def _reduce(self) -> None: ...


class Hessian(Statistic):
    """H = 2/n · Σ x xᵀ, the second derivative of the layer's squared output error: fp32 [K, K]."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__()
        self._sum = torch.zeros(features, features, dtype=torch.float32, device=device)

    @property
    def value(self) -> Tensor:
        return self._sum * (2.0 / self.tokens)

    def _add(self, x: Tensor) -> None:
        self._sum.addmm_(x.T, x)

    def _reduce(self) -> None:
        sum_over_processes(self._sum)


class DiagonalBlocks(Statistic):
    """The blocks of :class:`Hessian` on the diagonal, of ``size`` columns each: fp32 [G, g, g].

    The last block is padded with zeros if it is shorter. 1/G of the Hessian's cost.
    """

    def __init__(self, features: int, size: int, device: torch.device) -> None:
        super().__init__()
        self._size = size
        self._padding = -features % size
        groups = (features + self._padding) // size
        self._sum = torch.zeros(groups, size, size, dtype=torch.float32, device=device)

    @property
    def value(self) -> Tensor:
        return self._sum * (2.0 / self.tokens)

    def _add(self, x: Tensor) -> None:
        x = torch.nn.functional.pad(x, (0, self._padding))
        groups = x.unflatten(1, (-1, self._size)).transpose(0, 1)  # [G, tokens, g]
        self._sum.baddbmm_(groups.transpose(1, 2), groups)

    def _reduce(self) -> None:
        sum_over_processes(self._sum)


class ColumnNorm(Statistic):
    """‖x_k‖₂ of each input feature over all tokens: fp64 [K], summed in fp64."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__()
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)

    @property
    def value(self) -> Tensor:
        return self._sum.sqrt()

    def _add(self, x: Tensor) -> None:
        self._sum += x.double().square().sum(0)

    def _reduce(self) -> None:
        sum_over_processes(self._sum)


class MeanAbs(Statistic):
    """mean |x| of each input feature: fp32 [K]."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__()
        self._sum = torch.zeros(features, dtype=torch.float32, device=device)

    @property
    def value(self) -> Tensor:
        return self._sum / self.tokens

    def _add(self, x: Tensor) -> None:
        self._sum += x.abs().sum(0)

    def _reduce(self) -> None:
        sum_over_processes(self._sum)
