"""Sizes at which an int32 sum or an index could overflow."""

from __future__ import annotations

import os

import pytest
import torch

import pumice
import reference

LARGEST_K = 2**17 - 1
GIB = 2**30


def available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127)])
def test_largest_sum(left: int, right: int) -> None:
    """131071 · 2^14 is just below 2^31; one float32 rounding of the sum is all that is lost."""
    q = torch.full((7, LARGEST_K), left, dtype=torch.int8)
    qweight = torch.full((5, LARGEST_K), right, dtype=torch.int8)
    y = pumice.ops.int8_linear(q, torch.ones(1), qweight, torch.ones(1), out_dtype=torch.float32)
    exact = torch.tensor(float(left * right * LARGEST_K), dtype=torch.float32)
    assert torch.equal(y, exact.expand(7, 5))


def test_largest_k_mixed() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, LARGEST_K, generator=g)
    x[:, ::1000] *= 30
    qweight = torch.randint(-128, 128, (5, LARGEST_K), dtype=torch.int8, generator=g)
    weight = (qweight, torch.full((1,), 0.01), torch.ones(5))
    y = pumice.ops.int8_mixed_linear(x, *weight)
    exact, magnitude = reference.mixed_linear(x, *weight, 6.0, False)
    reference.assert_rounded(y, exact, magnitude)


def test_weight_beyond_2_31_elements() -> None:
    """Zeros that nobody touched take no memory; the last rows are told apart by their values."""
    n, k = 2**16 + 1, 2**15 + 1
    qweight = torch.zeros(n, k, dtype=torch.int8)
    qweight[-2:] = torch.tensor([[1], [2]], dtype=torch.int8)
    q = torch.ones(2, k, dtype=torch.int8)
    q[1] = 3
    y = pumice.ops.int8_linear(q, torch.ones(1), qweight, torch.ones(1), out_dtype=torch.float32)
    assert not y[:, :-2].any()
    assert y[:, -2:].tolist() == [[k, 2 * k], [3 * k, 6 * k]]


@pytest.mark.skipif(available_memory() < 6 * GIB, reason="needs 6 GiB of free memory")
def test_input_beyond_2_31_elements() -> None:
    m, k = 2**16 + 1, 2**15 + 1
    x = torch.zeros(m, k, dtype=torch.bfloat16)
    x[-1, -1], x[-1, -2], x[0, 0] = 4.0, -2.0, 8.0
    q, scale, outliers = pumice.ops.int8_quantize(x, threshold=6.0)
    assert (q[-1, -1], q[-1, -2], q[0, 0]) == (127, -64, 0)
    assert torch.count_nonzero(q[-1]) == 2
    assert not q[-2].any()
    assert scale[-1] == torch.tensor(4.0) / 127
    assert outliers.nonzero().tolist() == [[0]]
