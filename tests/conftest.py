"""Fixtures of the whole suite."""

from __future__ import annotations

import pytest
import torch

from backends import Backend, backend_named
from pumice.ops import _library


@pytest.fixture(params=["cpu", "emulated", *(["cuda"] if torch.cuda.is_available() else [])])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The same test on the CPU kernels, on the emulated CUDA kernels and on a GPU."""
    chosen = backend_named(request.param)
    monkeypatch.setattr(_library, "ops", chosen.ops)
    return chosen
