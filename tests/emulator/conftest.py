"""The emulator's self-test operators, and the same kernels on a GPU where there is one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
BUILD = Path(os.environ.get("PUMICE_EMULATOR", ROOT / "build" / "emulator"))
CUDA_LIBRARY = BUILD / "libpumice_selftest_cuda.so"


@dataclass(frozen=True)
class Selftest:
    """The operators of selftest/ops.cpp, taking CPU tensors."""

    ops: Any
    device: str

    def __call__(self, name: str, *arguments: Any) -> torch.Tensor:
        """Call an operator whose last argument is written to; return that."""
        moved = [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in arguments]
        getattr(self.ops, name)(*moved)
        result: torch.Tensor = moved[-1].cpu()
        return result


def emulated() -> Selftest:
    library = BUILD / "libpumice_selftest.so"
    if not library.exists():
        reason = f"{library} is not built (make emulator)"
        if os.environ.get("PUMICE_REQUIRE_EMULATOR") == "1":
            pytest.fail(f"PUMICE_REQUIRE_EMULATOR=1, but {reason}", pytrace=False)
        pytest.skip(reason)
    torch.ops.load_library(str(library))
    return Selftest(torch.ops.pumice_selftest, "cpu")


def on_gpu() -> Selftest:
    if not CUDA_LIBRARY.exists():
        pytest.skip(f"{CUDA_LIBRARY} is not built (cmake -DPUMICE_SELFTEST_CUDA=ON)")
    torch.ops.load_library(str(CUDA_LIBRARY))
    return Selftest(torch.ops.pumice_selftest_cuda, "cuda")


@pytest.fixture(params=["emulated", *(["cuda"] if torch.cuda.is_available() else [])])
def selftest(request: pytest.FixtureRequest) -> Selftest:
    """Each body of the wrappers."""
    return emulated() if request.param == "emulated" else on_gpu()


@pytest.fixture
def emulator() -> Selftest:
    return emulated()


@pytest.fixture
def both_bodies() -> tuple[Selftest, Selftest]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return emulated(), on_gpu()


@pytest.fixture(params=[0, 1, 2])
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the order in which threads and blocks get their turns."""
    monkeypatch.setenv("PUMICE_EMULATOR_SEED", str(request.param))
    return int(request.param)
