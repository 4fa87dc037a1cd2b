"""Shuffles, votes, reductions, atomics and integer intrinsics against plain Python."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import pytest
import torch

from .conftest import Selftest

LANES = range(32)


def signed(x: int) -> int:
    """The int32 with these low 32 bits."""
    return (x & 0xFFFFFFFF) - ((x & 0x80000000) << 1)


def shfl(lane: int, operand: int, width: int) -> int:
    return lane // width * width + operand % width


def shfl_up(lane: int, operand: int, width: int) -> int:
    return lane - operand if lane % width >= operand else lane


def shfl_down(lane: int, operand: int, width: int) -> int:
    return lane + operand if lane % width + operand < width else lane


def shfl_xor(lane: int, operand: int, width: int) -> int:
    source = lane ^ operand
    return source if source // width <= lane // width else lane


@pytest.mark.parametrize("width", [2, 8, 16, 32])
@pytest.mark.parametrize("source", [shfl, shfl_up, shfl_down, shfl_xor])
def test_shuffle(selftest: Selftest, source: Callable[[int, int, int], int], width: int) -> None:
    torch.manual_seed(width)
    x = torch.randint(-(2**31), 2**31 - 1, (32,), dtype=torch.int32)
    # Every lane has an operand of its own, though the hardware's users mostly give one for all.
    operand = torch.randint(0, width, (32,), dtype=torch.int32)
    y = selftest("collective", source.__name__, x, operand, width, torch.zeros_like(x))
    assert y.tolist() == [int(x[source(lane, int(operand[lane]), width)]) for lane in LANES]


@pytest.mark.parametrize("bits", [0, 0xFFFFFFFF, 0x80000001, 0x00F0C3A5])
def test_votes(selftest: Selftest, bits: int) -> None:
    x = torch.tensor([bits >> lane & 1 for lane in LANES], dtype=torch.int32)
    expected = {"ballot": signed(bits), "any": bits != 0, "all": bits == 0xFFFFFFFF}
    for name, value in expected.items():
        y = selftest("collective", name, x, x, 32, torch.full_like(x, 7))
        assert y.tolist() == [int(value)] * 32, name


@pytest.mark.parametrize(
    ("name", "fold"),
    [
        ("add", operator.add),
        ("min", min),
        ("max", max),
        ("and", operator.and_),
        ("or", operator.or_),
        ("xor", operator.xor),
    ],
)
def test_reductions_and_atomics(
    selftest: Selftest, name: str, fold: Callable[[int, int], int]
) -> None:
    torch.manual_seed(1)
    x = torch.randint(-(2**31), 2**31 - 1, (192,), dtype=torch.int32)
    warp = x[:32].contiguous()
    y = selftest("collective", f"reduce_{name}", warp, warp, 32, torch.zeros_like(warp))
    assert y.tolist() == [signed(functools.reduce(fold, warp.tolist()))] * 32
    start = 12345
    both = selftest("atomic", name, x, torch.full((2,), start, dtype=torch.int32))
    assert both.tolist() == [signed(functools.reduce(fold, x.tolist(), start))] * 2


def byte_perm(a: int, b: int, selector: int) -> int:
    source = (a & 0xFFFFFFFF).to_bytes(4, "little") + (b & 0xFFFFFFFF).to_bytes(4, "little")
    result = b""
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = source[nibble & 7]
        result += bytes([(255 if byte & 0x80 else 0) if nibble & 8 else byte])
    return int.from_bytes(result, "little")


def dp4a(a: int, b: int, c: int) -> int:
    def bytes_of(x: int) -> list[int]:
        return [v - 256 if v > 127 else v for v in (x & 0xFFFFFFFF).to_bytes(4, "little")]

    return c + sum(x * y for x, y in zip(bytes_of(a), bytes_of(b), strict=True))


def wide(low: int, high: int) -> int:
    return (high & 0xFFFFFFFF) << 32 | (low & 0xFFFFFFFF)


INTRINSICS: dict[str, Callable[[int, int, int], int]] = {
    "byte_perm": byte_perm,
    "funnelshift_l": lambda a, b, c: wide(a, b) << (c & 31) >> 32,
    "funnelshift_r": lambda a, b, c: wide(a, b) >> (c & 31),
    "dp4a": dp4a,
    "popc": lambda a, b, c: (a & 0xFFFFFFFF).bit_count(),
    "clz": lambda a, b, c: 32 - (a & 0xFFFFFFFF).bit_length(),
    "ffs": lambda a, b, c: (a & -a & 0xFFFFFFFF).bit_length(),
    "brev": lambda a, b, c: int(f"{a & 0xFFFFFFFF:032b}"[::-1], 2),
    "mulhi": lambda a, b, c: a * b >> 32,
    "and_or": lambda a, b, c: a & b | c,
}


@pytest.mark.parametrize("name", INTRINSICS)
def test_intrinsic(selftest: Selftest, name: str) -> None:
    torch.manual_seed(2)
    a, b, c = (torch.randint(-(2**31), 2**31 - 1, (300,), dtype=torch.int32) for _ in range(3))
    a[:4] = torch.tensor([0, -1, 1, -(2**31)], dtype=torch.int32)
    y = selftest("intrinsic", name, a, b, c, torch.zeros_like(a))
    arguments = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    assert y.tolist() == [signed(INTRINSICS[name](*abc)) for abc in arguments]


def test_float_to_integer_saturates(selftest: Selftest) -> None:
    cases = {0.5: 0, 1.5: 2, 2.5: 2, -0.5: 0, -1.5: -2, 2147483520.0: 2147483520}
    limits = {3e9: 2**31 - 1, -3e9: -(2**31), float("inf"): 2**31 - 1, float("nan"): 0}
    x = torch.tensor([*cases, *limits])
    bits = x.view(torch.int32)
    y = selftest("intrinsic", "float2int_rn", bits, bits, bits, torch.zeros_like(bits))
    assert y.tolist() == [*cases.values(), *limits.values()]
