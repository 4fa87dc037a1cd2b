"""int4_pack, int4_unpack, int4_dequantize: bit patterns by hand, exact round trips."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import pumice
import reference
from backends import Backend
from cases import FLOATS, size, surrounded
from int4_cases import Int4Case, dequantize

BITS = (2, 3, 4, 8)


def words(*values: int) -> Tensor:
    """int32 words given as unsigned ones."""
    return torch.tensor([values], dtype=torch.int64).to(torch.int32)


# Value k lies at bit k·bits, the least significant first: read the binary from the right.
PATTERNS = [
    (4, [1, 2, 3, 4, 5, 6, 7, 8], words(0x87654321)),
    (4, [15, 0, 0, 0, 0, 0, 0, 9, 10], words(0x9000000F, 0xA)),
    (4, [8], words(0x8)),
    (8, [1, 2, 254, 255, 128], words(0xFFFE0201, 0x80)),
    (2, [3, 2, 1, 0], words(0b00_01_10_11)),
    (2, [0] * 15 + [3, 1], words(0xC0000000, 0x1)),
    (3, [1, 2, 3, 4, 5, 6, 7], words(0b111_110_101_100_011_010_001)),
    # Values 10 and 21 of 32 lie across two words: 2 + 1 bits, then 1 + 2 bits.
    (3, [0] * 10 + [0b101], words(0b01 << 30, 0b1)),
    (3, [0] * 21 + [0b110], words(0, 0b0 << 31, 0b11)),
    (3, [0] * 31 + [0b101, 0b111], words(0, 0, 0b101 << 29, 0b111)),
]


@pytest.mark.parametrize(("bits", "values", "expected"), PATTERNS)
def test_known_bits(backend: Backend, bits: int, values: list[int], expected: Tensor) -> None:
    q = torch.tensor([values], dtype=torch.uint8, device=backend.device)
    qweight = pumice.ops.int4_pack(q, bits)
    assert qweight.dtype == torch.int32
    assert torch.equal(qweight.cpu(), expected)
    assert torch.equal(pumice.ops.int4_unpack(qweight, len(values), bits), q)


def round_trip(backend: Backend, q: Tensor, bits: int) -> None:
    qweight = pumice.ops.int4_pack(q.to(backend.device), bits)
    n, k = q.shape
    assert qweight.shape == (n, -(-k * bits // 32))
    assert torch.equal(pumice.ops.int4_unpack(qweight, k, bits).cpu(), q)


@pytest.mark.parametrize("bits", BITS)
def test_every_small_shape(backend: Backend, bits: int) -> None:
    """Every number of columns around one and two words, every value in every place."""
    largest = 2 * 32 // bits + 3 if bits != 3 else 70
    if backend.name == "emulated":
        largest = min(largest, 24)
    for k in range(1, largest + 1):
        shift = torch.arange(2**bits).reshape(-1, 1)
        q = (torch.arange(k) + shift).remainder(2**bits).to(torch.uint8)
        round_trip(backend, q[: 8 if backend.name == "emulated" else None], bits)


@pytest.mark.parametrize("bits", [2, 3])
def test_every_content(backend: Backend, bits: int) -> None:
    """Every content of a few values, exhaustively."""
    count = {2: 4, 3: 3}[bits]
    contents = itertools.product(range(2**bits), repeat=count)
    q = torch.tensor(list(contents), dtype=torch.uint8)
    round_trip(backend, q[:: 16 if backend.name == "emulated" else 1], bits)


def test_round_trip(backend: Backend) -> None:
    _, n, k = backend.largest
    strategy = st.tuples(st.sampled_from(BITS), size(n), size(k), st.integers(0, 2**31 - 1))

    @backend.for_all(strategy)
    def check(drawn: tuple[int, int, int, int]) -> None:
        bits, n, k, seed = drawn
        g = torch.Generator().manual_seed(seed)
        q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g)
        round_trip(backend, q, bits)


@pytest.mark.parametrize("bits", BITS)
def test_unused_bits_are_zero(backend: Backend, bits: int) -> None:
    q = torch.full((3, 5), 2**bits - 1, dtype=torch.uint8, device=backend.device)
    bytes_of = pumice.ops.int4_pack(q, bits).cpu().numpy().view(np.uint8)
    ones = int(np.unpackbits(bytes_of).sum())
    assert ones == 3 * 5 * bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pack_refuses_what_does_not_fit(backend: Backend, bits: int) -> None:
    q = torch.zeros(2, 9, dtype=torch.uint8, device=backend.device)
    q[1, 8] = 2**bits
    with pytest.raises(
        RuntimeError, match=f"int4_pack: q holds a value that does not fit .*{bits}"
    ):
        pumice.ops.int4_pack(q, bits)


def test_strides_and_surroundings(backend: Backend) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randint(0, 8, (7, 50), dtype=torch.uint8, generator=g).to(backend.device)
    expected = pumice.ops.int4_pack(q, 3)
    assert torch.equal(pumice.ops.int4_pack(q.T.contiguous().T, 3), expected)
    assert torch.equal(pumice.ops.int4_pack(surrounded(q), 3), expected)
    assert torch.equal(pumice.ops.int4_unpack(surrounded(expected), 50, 3), q)


def as_rounded(weight: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(weight.astype(np.float32)).to(dtype)


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("order", ["natural", "g_idx"])
@pytest.mark.parametrize("zeros", [None, "integer", "float"])
@pytest.mark.parametrize("bits", BITS)
def test_dequantize(
    backend: Backend, bits: int, zeros: str | None, order: str, out_dtype: torch.dtype
) -> None:
    for k, group_size, scale_dtype in (
        (100, 16, torch.float16),
        (130, 64, torch.bfloat16),
        (31, -1, torch.float32),
        (97, 48, torch.float32),
    ):
        case = Int4Case(n=5, k=k, bits=bits, group_size=group_size, scale_dtype=scale_dtype,
                        zeros=zeros, order=order)  # fmt: skip
        tensors = case.tensors()
        weight, magnitude = dequantize(case, tensors)
        moved = {
            name: None if (t := tensors[name]) is None else t.to(backend.device)
            for name in ("q", "scales", "zeros", "g_idx")
        }
        qweight = pumice.ops.int4_pack(moved.pop("q"), bits)
        actual = pumice.ops.int4_dequantize(
            qweight, **moved, k=k, group_size=group_size, bits=bits, out_dtype=out_dtype
        )
        assert (actual.dtype, actual.shape) == (out_dtype, (5, k))
        if zeros != "float":  # one rounding to float32, one to the result
            assert torch.equal(actual.cpu(), as_rounded(weight, out_dtype))
        reference.assert_rounded(actual, weight, magnitude, extra=2.0**-23)


@pytest.mark.parametrize("out_dtype", FLOATS)
def test_dequantize_has_the_same_bits_everywhere(backend: Backend, out_dtype: torch.dtype) -> None:
    """(q - zero) and its product with scale, each rounded to float32."""
    case = Int4Case(n=6, k=80, group_size=32, zeros="float", scale_dtype=torch.float32)
    tensors = case.tensors()
    group = case.group_of(None)
    scales, zeros = tensors["scales"][:, group], tensors["zeros"][:, group]
    expected = ((tensors["q"].float() - zeros) * scales).to(out_dtype)
    moved = {name: tensors[name].to(backend.device) for name in ("q", "scales", "zeros")}
    qweight = pumice.ops.int4_pack(moved.pop("q"))
    actual = pumice.ops.int4_dequantize(qweight, **moved, k=80, group_size=32, out_dtype=out_dtype)
    assert torch.equal(actual.cpu(), expected)


def test_meta_tensors() -> None:
    q = torch.zeros(3, 50, dtype=torch.uint8, device="meta")
    qweight = pumice.ops.int4_pack(q, 3)
    assert (qweight.shape, qweight.dtype) == ((3, 5), torch.int32)
    assert pumice.ops.int4_unpack(qweight, 50, 3).shape == (3, 50)
    scales = torch.ones(3, 4, device="meta")
    weight = pumice.ops.int4_dequantize(
        qweight, scales, k=50, group_size=16, bits=3, out_dtype=torch.bfloat16
    )
    assert (weight.shape, weight.dtype, weight.device.type) == ((3, 50), torch.bfloat16, "meta")
