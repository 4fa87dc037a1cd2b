"""The sparse24 benchmark: its contenders compute the same product."""

from __future__ import annotations

import pytest
import torch

from bench import sparse24
from bench.cases import Linear, UnavailableError
from bench.machine import Machine

MACHINE = Machine("cpu", "Test CPU 2 threads", 2, 10e9, 1 << 16, None, None)


def test_contenders_compute_the_same_product() -> None:
    for m in (2, 7):
        inputs = sparse24.make_inputs(
            Linear(m, 32, 256), MACHINE, torch.device("cpu"), torch.float32
        )
        reference = sparse24.PEERS["torch"](inputs)(1)
        limits = {"pumice": 1e-5, "pumice int8": 0.02, "pumice int4": 0.2}
        compared = set()
        for name in set(sparse24.PEERS) - {"torch"}:
            try:
                y = sparse24.PEERS[name](inputs)(1)
            except UnavailableError:
                continue
            limit = limits[name.removesuffix(" dense")]
            assert (y - reference).norm() < limit * reference.norm(), name
            compared.add(name)
        assert compared == set(sparse24.PEERS) - {"torch", "torch 2:4"}
        for kind in ("int8", "int4"):
            sparse, dense = (sparse24.PEERS[f"pumice {kind}{s}"](inputs)(1) for s in ("", " dense"))
            torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-4)


def test_floor_counts_half_the_work() -> None:
    bytes_moved = 64 * 256 * 2 // 2 + 64 * 256 // 8 + 3 * (256 + 64) * 2
    floor = sparse24.floor_us(Linear(3, 64, 256), MACHINE, torch.bfloat16)
    assert floor == pytest.approx(bytes_moved / MACHINE.bandwidth * 1e6)
