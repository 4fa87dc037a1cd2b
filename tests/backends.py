"""Backends: where the operators can run in a test."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from pumice.ops import _library

ROOT = Path(__file__).parent.parent
EMULATOR = Path(os.environ.get("PUMICE_EMULATOR", ROOT / "build" / "emulator"))


@dataclass(frozen=True)
class Backend:
    """Where the operators run, and how much work that place can be given."""

    name: str
    device: str
    ops: Any  # torch.ops.<namespace>
    examples: int  # of each property
    largest: tuple[int, int, int]  # M, N, K

    def for_all(self, strategy: SearchStrategy[Any]) -> Callable[[Callable[[Any], None]], None]:
        """Run a property now, on examples of the strategy: a decorator without a name to call."""

        def run(body: Callable[[Any], None]) -> None:
            checked = settings(
                max_examples=self.examples,
                deadline=None,
                derandomize=True,  # a failure in CI is a failure at home
                suppress_health_check=list(HealthCheck),
            )(given(strategy)(body))
            checked()

        return run

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """One graph for all shapes; nothing is kept of what was compiled for another backend."""
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

    def multiplies_in_int8(self, m: int) -> bool:
        """CUDA multiplies few rows in 16 bit, without quantizing them."""
        return self.name == "cpu" or m > 32


def _emulated_ops() -> Any:
    """The CUDA kernels on the CPU: loaded once, with the fakes and gradients of pumice."""
    library = EMULATOR / "libpumice_emulated.so"
    if not library.exists():
        reason = f"{library} is not built (make emulator)"
        if os.environ.get("PUMICE_REQUIRE_EMULATOR") == "1":
            pytest.fail(f"PUMICE_REQUIRE_EMULATOR=1, but {reason}", pytrace=False)
        pytest.skip(reason)
    if str(library) not in torch.ops.loaded_libraries:
        torch.ops.load_library(str(library))
        _library.register("pumice_emulated")
    return torch.ops.pumice_emulated


def backend_named(name: str) -> Backend:
    if name == "cpu":
        return Backend(name, "cpu", torch.ops.pumice, 150, (140, 150, 700))
    if name == "cuda":
        return Backend(name, "cuda", torch.ops.pumice, 60, (300, 300, 1500))
    # A fiber for each CUDA thread: seconds for what a GPU does in microseconds.
    return Backend(name, "cpu", _emulated_ops(), 25, (140, 140, 260))
