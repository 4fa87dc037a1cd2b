"""Running peers over cases: what is the same for every op that is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from bench.machine import Machine
from bench.results import Row
from bench.timing import Contender, measure

BASELINE = "torch"  # torch's own op at the dtype of x: what the others are compared with


class Case(Protocol):
    """A size to measure at; its string names it in the tables."""

    @property
    def operations(self) -> int:
        """Multiplications and additions."""


@dataclass(frozen=True)
class Linear:
    """y[M, N] = x[M, K] @ W[N, K]^T."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"M={self.m} N={self.n} K={self.k}"

    @property
    def operations(self) -> int:
        return 2 * self.m * self.n * self.k


CaseT = TypeVar("CaseT", bound=Case)
InputsT = TypeVar("InputsT")


class UnavailableError(Exception):
    """Why a peer cannot run a case here."""


# A peer is offered the inputs and returns its contender, or raises UnavailableError.
Peer = Callable[[InputsT], Contender]


@dataclass(frozen=True)
class Bench(Generic[CaseT, InputsT]):
    """One op's benchmark. Contenders of pumice's own begin with "pumice"; its kernels are those of
    the catalogue whose names begin with one of `kernel_names`.

    With `rates` the tables show operations a second, beside the most that the floor allows, rather
    than times. `floors` holds contenders that move or compute less than the op's floor says."""

    op: str
    make_inputs: Callable[[CaseT, Machine, torch.device, torch.dtype], InputsT]
    peers: dict[str, Peer[InputsT]]
    floor_us: Callable[[CaseT, Machine, torch.dtype], float]
    kernel_names: tuple[str, ...]
    rates: bool = False
    floors: Mapping[str, Callable[[CaseT, Machine, torch.dtype], float]] = field(
        default_factory=dict
    )

    def kernels(self, device: torch.device) -> tuple[str, ...]:
        from pumice import _C

        return tuple(
            kernel["name"]
            for kernel in _C.kernels()
            if kernel["device"] == device.type and kernel["name"].startswith(self.kernel_names)
        )

    def run(
        self,
        cases: list[CaseT],
        machine: Machine,
        device: torch.device,
        dtype: torch.dtype,
        seconds: float,
        tell: Callable[[str], None],
    ) -> Iterator[Row]:
        """Measure every peer that can run, telling once why another cannot."""
        kernels = self.kernels(device)
        told: set[tuple[str, str]] = set()
        for case in cases:
            inputs = self.make_inputs(case, machine, device, dtype)
            contenders: dict[str, Contender] = {}
            for name, peer in self.peers.items():
                try:
                    contenders[name] = peer(inputs)
                except UnavailableError as reason:
                    if (name, str(reason)) not in told:
                        told.add((name, str(reason)))
                        tell(f"{name} skipped for {case}: {reason}")
            timings = measure(contenders, device, seconds)
            for name, timing in timings.items():
                yield Row(
                    op=self.op,
                    case=f"{case} {str(dtype).removeprefix('torch.')}",
                    contender=name,
                    median_us=timing.median,
                    low_us=timing.low,
                    high_us=timing.high,
                    floor_us=self.floors.get(name, self.floor_us)(case, machine, dtype),
                    baseline_us=timings[BASELINE].median,
                    kernels=kernels if name.startswith("pumice") else (),
                    operations=case.operations if self.rates else 0,
                )
