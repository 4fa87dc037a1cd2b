"""sparse24_int8_linear at the borders of its kernels, which panels of weight rows have many of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pumice
from backends import Backend, backend_named
from cases import surrounded
from sparse24_cases import prune


def operands(m: int, n: int, k: int, **fixed: int) -> dict[str, Tensor]:
    """All int8 values, -128 often; `fixed` gives q or w one value instead."""
    g = torch.Generator().manual_seed(m + 1000 * n + 10**6 * k)

    def matrix(rows: int, name: str) -> Tensor:
        if name in fixed:
            return torch.full((rows, k), fixed[name], dtype=torch.int8)
        x = torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=g)
        return torch.where(torch.rand(rows, k, generator=g) < 0.2, torch.tensor(-128).to(x), x)

    return {"q": matrix(m, "q"), "w": prune(matrix(n, "w"), g)}


def sums(backend: Backend, q: Tensor, w: Tensor) -> Tensor:
    """Σ q · w, as it comes out of the kernel: with scales of one."""
    values, meta = pumice.ops.sparse24_compress(w.to(backend.device))
    one = torch.ones(1, device=backend.device)
    return pumice.ops.sparse24_int8_linear(
        q.to(backend.device), one, values, meta, one, out_dtype=torch.float32
    ).cpu()


def exact(q: Tensor, w: Tensor) -> Tensor:
    return (q.double() @ w.double().T).float()


# Rows: few, those whose sums stay in registers, tiles as equal as can be, more than a block.
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 15, 16, 17, 31, 33, 65])
def test_rows(backend: Backend, m: int) -> None:
    if backend.name == "emulated" and m > 17:
        pytest.skip("the CPU's tiles")
    given = operands(m, 21, 164)
    assert torch.equal(sums(backend, **given), exact(**given))


# Columns of y: a panel is 8 or 16, a chunk 64.
@pytest.mark.parametrize("m", [2, 4, 7, 37])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 130])
def test_columns(backend: Backend, m: int, n: int) -> None:
    if backend.name == "emulated" and n > 17:
        pytest.skip("the CPU's chunks")
    given = operands(m, n, 68)
    assert torch.equal(sums(backend, **given), exact(**given))


# K: eight columns are a step, 32 a word of meta, 128 are loaded at once, 1024 a block.
@pytest.mark.parametrize("m", [1, 3, 6, 20])
@pytest.mark.parametrize(
    "k", [4, 8, 12, 28, 32, 36, 60, 96, 124, 128, 132, 160, 508, 512, 516, 1020, 1024, 1028, 2180]
)
def test_depth(backend: Backend, m: int, k: int) -> None:
    if backend.name == "emulated" and k > 600:
        pytest.skip("the CPU's blocks")
    given = operands(m, 19, k)
    assert torch.equal(sums(backend, **given), exact(**given))


@pytest.mark.parametrize("m", [255, 256, 257, 513])
def test_blocks_of_rows(m: int) -> None:
    backend = backend_named("cpu")
    given = operands(m, 70, 1100)
    assert torch.equal(sums(backend, **given), exact(**given))


@pytest.mark.parametrize("m", [1, 4, 8, 12])
@pytest.mark.parametrize(("q", "w"), [(-128, -128), (-128, 127), (127, -128), (127, 127)])
def test_largest_products(backend: Backend, m: int, q: int, w: int) -> None:
    given = operands(m, 18, 264, q=q, w=w)
    assert torch.equal(sums(backend, **given), exact(**given))


@pytest.mark.parametrize("m", [4, 9])
def test_sums_wrap_on_the_way_only(m: int) -> None:
    """The largest K: what is taken off in the end, 128 Σ w, is near 2^31 itself."""
    backend = backend_named("cpu")
    given = operands(m, 3, 131068, q=-128, w=-128)
    assert torch.equal(sums(backend, **given), exact(**given))


@pytest.mark.parametrize("m", [1, 3, 7, 10, 40])
def test_every_place(backend: Backend, m: int) -> None:
    """Each group keeps one of the six pairs, each row of x is another power of two in it."""
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    groups = 48
    w = torch.zeros(17, groups, 4, dtype=torch.int8)
    for n in range(17):
        for group in range(groups):
            a, b = pairs[(n + group + group // 6) % 6]
            w[n, group, a], w[n, group, b] = 3, -5
    q = torch.tensor([1, 2, 4, 8], dtype=torch.int8).repeat(m, groups)
    q *= torch.arange(4 * groups).remainder(7).sub(3).to(torch.int8)
    given = {"q": q, "w": w.flatten(1)}
    assert torch.equal(sums(backend, **given), exact(**given))


@pytest.mark.parametrize("before", [1, 16])
def test_reads_nothing_beyond(backend: Backend, before: int) -> None:
    for m, n, k in ((1, 5, 68), (3, 19, 132), (7, 9, 36), (10, 17, 100), (34, 18, 260)):
        given = operands(m, n, k)
        values, meta = pumice.ops.sparse24_compress(given["w"].to(backend.device))
        g = torch.Generator().manual_seed(n)
        tensors: list[Any] = [
            given["q"].to(backend.device),
            torch.rand(m, generator=g).to(backend.device),
            values,
            meta,
            torch.rand(n, generator=g).to(backend.device),
            torch.rand(n, generator=g).half().to(backend.device),
        ]
        run = pumice.ops.sparse24_int8_linear
        expected = run(*tensors, out_dtype=torch.bfloat16)
        actual = run(*[surrounded(t, before) for t in tensors], out_dtype=torch.bfloat16)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("m", [1, 3, 8, 13, 300])
def test_threads_change_nothing(m: int) -> None:
    given = operands(m, 203, 516)
    values, meta = pumice.ops.sparse24_compress(given["w"])
    scales = torch.rand(m) * 0.1, torch.rand(203) * 0.1
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            y = pumice.ops.sparse24_int8_linear(
                given["q"], scales[0], values, meta, scales[1], out_dtype=torch.float16
            )
            results.append(y)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(y, results[0]) for y in results)


def test_rows_do_not_see_each_other() -> None:
    """Whatever kernel their number chooses, each row gets what it gets alone, to the bit."""
    given = operands(70, 37, 300)
    values, meta = pumice.ops.sparse24_compress(given["w"])
    scale, weight_scale = torch.rand(70), torch.rand(37)

    def run(begin: int, end: int) -> Tensor:
        return pumice.ops.sparse24_int8_linear(
            given["q"][begin:end], scale[begin:end], values, meta, weight_scale,
            out_dtype=torch.bfloat16,
        )  # fmt: skip

    together = run(0, 70)
    for rows in (1, 3, 6, 9, 33):
        assert torch.equal(torch.cat([run(i, i + rows) for i in range(0, 70, rows)]), together)
