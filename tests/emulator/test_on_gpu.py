"""Both bodies of every wrapper on random registers: the GPU's word against the emulator's."""

from __future__ import annotations

import pytest
import torch

from .conftest import Selftest
from .test_collectives import INTRINSICS

Bodies = tuple[Selftest, Selftest]


def assert_same(bodies: Bodies, name: str, *arguments: object) -> None:
    emulated, real = bodies
    last = arguments[-1]
    assert isinstance(last, torch.Tensor)
    want = emulated(name, *arguments[:-1], last.clone())
    got = real(name, *arguments[:-1], last.clone())
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def random_words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


@pytest.mark.parametrize("seed", range(5))
def test_mma_s8(both_bodies: Bodies, seed: int) -> None:
    torch.manual_seed(seed)
    assert_same(
        both_bodies, "mma", "s8", random_words(32, 4), random_words(32, 2), random_words(32, 4)
    )


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_mma_floating_point(both_bodies: Bodies, kind: str, dtype: torch.dtype) -> None:
    """Sums that need no rounding: small integers, and single products over the whole range."""
    torch.manual_seed(0)
    a = torch.randint(-16, 17, (32, 8)).to(dtype).view(torch.int32)
    b = torch.randint(-16, 17, (32, 4)).to(dtype).view(torch.int32)
    assert_same(both_bodies, "mma", kind, a, b, torch.randint(-99, 99, (32, 4)).float())
    one = torch.zeros(32, 8, dtype=dtype)
    one[:, 0] = torch.where(torch.arange(32) % 4 == 0, torch.randn(32), 0.0).to(dtype)
    b = torch.randn(32, 4).to(dtype).view(torch.int32)
    assert_same(both_bodies, "mma", kind, one.view(torch.int32), b, torch.zeros(32, 4))


@pytest.mark.parametrize("kind", ["s8", "f16", "bf16"])
@pytest.mark.parametrize("selector", [0, 1])
def test_mma_sp(both_bodies: Bodies, kind: str, selector: int) -> None:
    """Where sums need no rounding; any defined metadata in any lane."""
    torch.manual_seed(selector)
    nibbles = torch.tensor([0x4, 0x8, 0x9, 0xC, 0xD, 0xE])[torch.randint(0, 6, (32, 8))]
    metadata = (nibbles << (4 * torch.arange(8))).sum(1)
    metadata = torch.where(metadata >= 2**31, metadata - 2**32, metadata).int()
    if kind == "s8":
        a, b, d = random_words(32, 4), random_words(32, 4), random_words(32, 4)
        assert_same(both_bodies, "mma_sp", kind, 0, a, b, metadata, d)
        return
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    a, b = (torch.randint(-16, 17, (32, 8)).to(dtype).view(torch.int32) for _ in range(2))
    d = torch.randint(-99, 99, (32, 4)).float()
    assert_same(both_bodies, "mma_sp", kind, selector, a, b, metadata, d)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(both_bodies: Bodies, count: int, transpose: bool) -> None:
    memory = torch.randint(0, 256, (1024,), dtype=torch.uint8)
    rows = 16 * torch.randint(0, 64, (32,), dtype=torch.int32)
    y = torch.zeros(32, count, dtype=torch.int32)
    assert_same(both_bodies, "ldmatrix", memory, rows, count, transpose, y)


@pytest.mark.parametrize("size", [16, 8, 4])
def test_copies_and_loads(both_bodies: Bodies, size: int) -> None:
    x = torch.randint(0, 256, (64 * size,), dtype=torch.uint8)
    valid = torch.tensor([0, size], dtype=torch.int32).repeat(32)
    assert_same(both_bodies, "cp_async", x, valid, size, torch.zeros_like(x))
    words = torch.zeros(16 * size, dtype=torch.int32)
    assert_same(both_bodies, "load_streaming", x, size, words)
    assert_same(both_bodies, "store_16", x, torch.zeros_like(x))


@pytest.mark.parametrize(
    "name",
    ["shfl", "shfl_up", "shfl_down", "shfl_xor", "ballot", "any", "all"]
    + [f"reduce_{fold}" for fold in ("add", "min", "max", "and", "or", "xor")],
)
def test_collective(both_bodies: Bodies, name: str) -> None:
    for width in (4, 32):
        operand = torch.randint(0, width, (32,), dtype=torch.int32)
        assert_same(
            both_bodies, "collective", name, random_words(32), operand, width, random_words(32)
        )


@pytest.mark.parametrize("name", [*INTRINSICS, "float2int_rn", "thread_index"])
def test_intrinsic(both_bodies: Bodies, name: str) -> None:
    words = [random_words(1000) for _ in range(3)]
    assert_same(both_bodies, "intrinsic", name, *words, torch.zeros(1000, dtype=torch.int32))


def test_e4m3(both_bodies: Bodies) -> None:
    pairs = torch.arange(2**16, dtype=torch.int32).view(64, 1024)
    for words in pairs:
        assert_same(both_bodies, "e4m3", words.contiguous(), torch.zeros(1024, dtype=torch.int32))


def test_gemm(both_bodies: Bodies) -> None:
    a = torch.randint(-128, 128, (128, 192), dtype=torch.int8)
    b = torch.randint(-128, 128, (256, 192), dtype=torch.int8)
    assert_same(both_bodies, "gemm", a, b, torch.zeros(128, 256, dtype=torch.int32))
