"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from backends import Backend, backend_named
from pumice.ops import _library


@pytest.fixture(
    scope="session",
    params=["cpu", "emulated", *(["cuda"] if torch.cuda.is_available() else [])],
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The same test on the CPU kernels, on the emulated CUDA kernels and on a GPU."""
    chosen = backend_named(request.param)
    before = _library.ops
    _library.ops = chosen.ops
    torch._dynamo.reset()
    yield chosen
    _library.ops = before
    torch._dynamo.reset()
