"""Each PTX wrapper against its documented fragment layout, written out as plain loops.

The layouts are transcribed from the PTX ISA ("Matrix Fragments for mma.m16n8k32", "... for
mma.m16n8k16 with floating point type", "ldmatrix"), element by element as they stand there, and
know nothing of csrc/cuda/ptx or of the emulator's own way to write them.
"""

from __future__ import annotations

import pytest
import torch

from .conftest import Selftest

LANES = range(32)


def a_element_s8(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of a_i, 0 ≤ i < 16, in the 16 × 32 matrix A."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    column = thread * 4 + (i & 3) if i < 8 else thread * 4 + (i & 3) + 16
    return row, column


def b_element_s8(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of b_i, 0 ≤ i < 8, in the 32 × 8 matrix B."""
    group, thread = lane >> 2, lane % 4
    row = thread * 4 + (i & 3) if i < 4 else thread * 4 + (i & 3) + 16
    return row, group


def a_element_f16(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of a_i, 0 ≤ i < 8, in the 16 × 16 matrix A."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    column = thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
    return row, column


def b_element_f16(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of b_i, 0 ≤ i < 4, in the 16 × 8 matrix B."""
    group, thread = lane >> 2, lane % 4
    row = thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8
    return row, group


def c_element(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of c_i, 0 ≤ i < 4, in the 16 × 8 matrices C and D."""
    group, thread = lane >> 2, lane % 4
    row = group if i < 2 else group + 8
    return row, thread * 2 + (i & 1)


def run_mma(
    selftest: Selftest, kind: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """D of D = A·B + C, through the fragments."""
    a_element, b_element = (
        (a_element_s8, b_element_s8) if kind == "s8" else (a_element_f16, b_element_f16)
    )
    per_lane_a, per_lane_b = (16, 8) if kind == "s8" else (8, 4)
    a_registers = torch.empty(32, per_lane_a, dtype=a.dtype)
    b_registers = torch.empty(32, per_lane_b, dtype=b.dtype)
    d_registers = torch.empty(32, 4, dtype=c.dtype)
    for lane in LANES:
        for i in range(per_lane_a):
            a_registers[lane, i] = a[a_element(lane, i)]
        for i in range(per_lane_b):
            b_registers[lane, i] = b[b_element(lane, i)]
        for i in range(4):
            d_registers[lane, i] = c[c_element(lane, i)]
    result = selftest(
        "mma", kind, a_registers.view(torch.int32), b_registers.view(torch.int32), d_registers
    )
    d = torch.full_like(c, -12345)
    for lane in LANES:
        for i in range(4):
            d[c_element(lane, i)] = result[lane, i]
    return d


def test_mma_s8(selftest: Selftest) -> None:
    torch.manual_seed(0)
    a = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    b = torch.randint(-128, 128, (32, 8), dtype=torch.int8)
    c = torch.randint(-(2**20), 2**20, (16, 8), dtype=torch.int32)
    assert torch.equal(run_mma(selftest, "s8", a, b, c), a.int() @ b.int() + c)


def test_mma_s8_wraps_around(selftest: Selftest) -> None:
    a = torch.full((16, 32), -128, dtype=torch.int8)
    b = torch.full((32, 8), -128, dtype=torch.int8)
    c = torch.full((16, 8), 2**31 - 1, dtype=torch.int32)
    wrapped = (2**31 - 1 + 32 * 2**14) - 2**32
    assert torch.equal(run_mma(selftest, "s8", a, b, c), torch.full_like(c, wrapped))


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_mma_floating_point(selftest: Selftest, kind: str, dtype: torch.dtype) -> None:
    """On small integers, whose sums every order and rounding gives exactly."""
    torch.manual_seed(0)
    a = torch.randint(-16, 17, (16, 16)).to(dtype)
    b = torch.randint(-16, 17, (16, 8)).to(dtype)
    c = torch.randint(-1024, 1025, (16, 8)).float()
    assert torch.equal(run_mma(selftest, kind, a, b, c), a.float() @ b.float() + c)


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_mma_floating_point_error(selftest: Selftest, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c = torch.randn(16, 8)
    exact = a.double() @ b.double() + c.double()
    bound = (a.double().abs() @ b.double().abs() + c.double().abs()) * 2**-20
    assert ((run_mma(selftest, kind, a, b, c).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_mma_not_finite(selftest: Selftest, kind: str, dtype: torch.dtype) -> None:
    """A NaN reaches its row and an infinity with a zero its element; nothing else."""
    a, b = torch.ones(16, 16, dtype=dtype), torch.ones(16, 8, dtype=dtype)
    a[3, 5], a[9, 2], b[2, 4] = float("nan"), float("inf"), 0
    d = run_mma(selftest, kind, a, b, torch.zeros(16, 8))
    expected = a.float() @ b.float()
    assert torch.equal(d.isnan(), expected.isnan())
    assert torch.equal(d.nan_to_num(), expected.nan_to_num())
    assert d.isnan().sum() == 9


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(selftest: Selftest, count: int, transpose: bool) -> None:
    """Rows at scattered addresses; those of lanes that give none are out of bounds on purpose."""
    torch.manual_seed(count)
    memory = torch.randint(0, 256, (64 * 16,), dtype=torch.uint8)
    rows = 16 * torch.randperm(64)[:32].int()
    rows[8 * count :] = 2**20
    result = selftest(
        "ldmatrix", memory, rows, count, transpose, torch.zeros(32, count, dtype=torch.int32)
    )
    elements = memory.view(torch.int16)
    halves = result.view(torch.int16).view(32, count, 2)
    for lane in LANES:
        for matrix in range(count):
            for half in range(2):
                # Row and column of the 8 × 8 matrix, as stored; "each thread receives a fragment
                # of a row: thread 4r + c elements 2c and 2c + 1 of row r".
                r, c = lane // 4, 2 * (lane % 4) + half
                if transpose:
                    r, c = c, r
                start = int(rows[8 * matrix + r]) // 2
                assert halves[lane, matrix, half] == elements[start + c]


@pytest.mark.parametrize("size", [16, 8, 4])
def test_cp_async(selftest: Selftest, size: int) -> None:
    """Bytes beyond the valid ones are zero, and a source without any is not read."""
    threads = 40
    x = torch.randint(1, 256, ((threads - 1) * size,), dtype=torch.uint8)  # one piece too short
    steps = [0, 3, 8, 15, 16] if size == 16 else [0, size]
    valid = torch.tensor([steps[t % len(steps)] for t in range(threads)], dtype=torch.int32)
    valid[-1] = 0
    y = selftest("cp_async", x, valid, size, torch.full((threads * size,), 7, dtype=torch.uint8))
    for t in range(threads):
        for i in range(size):
            assert y[t * size + i] == (x[t * size + i] if i < valid[t] else 0)


@pytest.mark.parametrize("size", [16, 8, 4])
def test_load_streaming(selftest: Selftest, size: int) -> None:
    x = torch.randint(0, 256, (48 * size,), dtype=torch.uint8)
    y = selftest("load_streaming", x, size, torch.zeros(48 * size // 4, dtype=torch.int32))
    assert torch.equal(y, x.view(torch.int32))


def test_store_16(selftest: Selftest) -> None:
    x = torch.randint(0, 256, (48 * 16,), dtype=torch.uint8)
    assert torch.equal(selftest("store_16", x, torch.zeros_like(x)), x)


def test_exp2(selftest: Selftest) -> None:
    """Two units in the last place; subnormal results are zero, infinities and NaN as expected."""
    x = torch.cat(
        [torch.linspace(-130, 130, 600), torch.tensor([torch.inf, -torch.inf, torch.nan])]
    )
    y = selftest("exp2", x, torch.empty_like(x))
    exact = torch.exp2(x.double())
    smallest_normal = torch.finfo(torch.float32).smallest_normal
    exact = torch.where(exact < smallest_normal, 0.0, exact)
    exact = torch.where(exact.float().isinf(), torch.inf, exact)
    assert torch.equal(y.isnan(), x.isnan())
    torch.testing.assert_close(y.double(), exact, rtol=2.0**-22, atol=0, equal_nan=True)


def test_e4m3(selftest: Selftest) -> None:
    """Every byte in both halves; NaN of either sign is 0x7fff."""
    every = torch.arange(256, dtype=torch.int32)
    pairs = every | every.flip(0) << 8
    y = selftest("e4m3", pairs, torch.zeros_like(pairs)).view(torch.float16).view(256, 2)
    exact = every.to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float16)
    for half, expected in ((y[:, 0], exact), (y[:, 1], exact.flip(0))):
        assert torch.equal(half.isnan(), expected.isnan())
        assert torch.equal(half.nan_to_num(7e3), expected.nan_to_num(7e3))
        assert (half[half.isnan()].view(torch.int16) == 0x7FFF).all()


def test_thread_index(selftest: Selftest) -> None:
    """Of blocks of 128 threads."""
    y = torch.zeros(300, dtype=torch.int32)
    expected = torch.arange(300, dtype=torch.int32) % 128
    assert torch.equal(selftest("intrinsic", "thread_index", y, y, y, y.clone()), expected)


def test_gemm(selftest: Selftest) -> None:
    """All of it together: a pipelined tensor-core product."""
    torch.manual_seed(0)
    a = torch.randint(-128, 128, (192, 320), dtype=torch.int8)
    b = torch.randint(-128, 128, (256, 320), dtype=torch.int8)
    y = selftest("gemm", a, b, torch.full((192, 256), -1, dtype=torch.int32))
    assert torch.equal(y, a.int() @ b.int().T)
