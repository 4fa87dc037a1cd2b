"""Shapes that take every tile of flash_backward, over several blocks, steps and heads of a group.

On a GPU with 99 KB of shared memory the same shapes take the compact tiles.
"""

from __future__ import annotations

import pytest
import torch

import attention_reference as reference
import pumice
from attention_reference import Options
from backends import Backend

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

# dtype, queries, keys, D, D_v, options
CASES = {
    "64, whole": (BRAIN, 64, 128, 64, 64, Options()),
    "64, causal": (HALF, 100, 150, 64, 48, Options(causal=True)),
    "64, window": (BRAIN, 130, 140, 40, 64, Options(window=(20, 5))),
    "128, causal": (BRAIN, 140, 270, 128, 96, Options(causal=True)),
    "128, softcap": (HALF, 70, 130, 80, 128, Options(causal=True, softcap=3.0)),
    "256, causal": (HALF, 70, 100, 192, 128, Options(causal=True)),
    "256, window": (BRAIN, 70, 100, 256, 200, Options(window=(-1, 9))),
    "fp32, 128": (SINGLE, 40, 70, 100, 128, Options(causal=True)),
    "fp32, 256": (SINGLE, 20, 40, 130, 20, Options(window=(9, 9))),
}


def check(
    backend: Backend,
    case: tuple[torch.dtype, int, int, int, int, Options],
    slopes: torch.Tensor | None = None,
) -> None:
    dtype, queries, keys, dim, value_dim, options = case
    g = torch.Generator().manual_seed(0)
    shapes = ((queries, 4, dim), (keys, 2, dim), (keys, 2, value_dim), (queries, 4, value_dim))
    *operands, upstream = (torch.randn(1, *shape, generator=g).to(dtype) for shape in shapes)

    def expected(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in operands]
        out, _ = reference.attention(*leaves, options, alibi_slopes=slopes, dtype=dtype)
        return torch.autograd.grad(out, leaves, upstream.to(dtype))

    leaves = [x.to(backend.device).requires_grad_() for x in operands]
    out = pumice.ops.flash_attention(
        *leaves,
        causal=options.causal,
        window=options.window,
        softcap=options.softcap,
        alibi_slopes=None if slopes is None else slopes.to(backend.device),
    )
    found = torch.autograd.grad(out, leaves, upstream.to(backend.device))
    for name, gradient, exact, plain in zip(
        ("query", "key", "value"), found, expected(torch.float64), expected(dtype), strict=True
    ):
        unit = 2 * reference.rounding(dtype) * max(1.0, reference.largest(exact))
        reference.assert_as_exact_as_plain(gradient, exact, plain, unit, name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_tiles(backend: Backend, case: tuple[torch.dtype, int, int, int, int, Options]) -> None:
    if backend.name == "cpu":
        pytest.skip("the tiles of the CUDA kernels")
    check(backend, case)


def test_rows_past_the_end_stay_out(backend: Backend) -> None:
    """A slope below zero makes scores grow with the distance: those of rows that a tile has beyond
    the sequence's last are beyond any number, and must not be multiplied by the zeros there."""
    slopes = torch.tensor([-3.0, -8.0, -20.0, -1.0])
    check(backend, (BRAIN, 70, 90, 64, 64, Options()), slopes)
