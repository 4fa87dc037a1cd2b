"""mma.sp against its documented fragments and metadata, written out as plain loops.

The fragments are transcribed from the PTX ISA ("Matrix Fragments for sparse mma.m16n8k32 with .f16
and .bf16 types", "... for sparse mma.m16n8k64 with .u8/.s8"), element by element. The ISA draws
where metadata lies; CUTLASS's reorder_meta() and the ELayout of its sparse 16x8x64 atoms say the
same in code.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .conftest import Selftest, emulated
from .test_ptx import c_element

LANES = range(32)
FLOATING = [("f16", torch.float16), ("bf16", torch.bfloat16)]
NIBBLES = {0b0100: (0, 1), 0b1000: (0, 2), 0b1001: (1, 2), 0b1100: (0, 3), 0b1101: (1, 3)}
NIBBLES[0b1110] = (2, 3)

Place = tuple[int, int]


def a_group_f16(lane: int, i: int) -> Place:
    """Row and first of the four columns that a_i, 0 ≤ i < 8, is kept of, in the 16 × 32 A."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    return row, thread * 4 if i < 4 else thread * 4 + 16


def b_element_f16(lane: int, i: int) -> Place:
    """(row, column) of b_i, 0 ≤ i < 8, in the 32 × 8 matrix B."""
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + 8 * (i // 2), group


def metadata_f16(lane: int, bit: int, selector: int) -> Place | None:
    """Row and first column that the nibble from this bit on belongs to; None: not read."""
    group, thread = lane >> 2, lane % 4
    if thread // 2 != selector:
        return None
    row = group if bit < 16 else group + 8
    return row, 16 * (thread % 2) + bit % 16


def a_group_s8(lane: int, i: int) -> Place:
    """Row and first of the four columns that a_i, 0 ≤ i < 16, is kept of, in the 16 × 64 A.

    "firstcol = threadID_in_group * 8 for a_i where i < 8, + 32 otherwise", of 8 columns, of which
    four are kept: two of each four.
    """
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    first = thread * 8 if i < 8 else thread * 8 + 32
    return row, first + 4 * (i % 4 // 2)


def b_element_s8(lane: int, i: int) -> Place:
    """(row, column) of b_i, 0 ≤ i < 16, in the 64 × 8 matrix B."""
    group, thread = lane >> 2, lane % 4
    return thread * 4 + (i & 3) + 16 * (i // 4), group


def metadata_s8(lane: int, bit: int, selector: int) -> Place | None:
    group, thread = lane >> 2, lane % 4
    return group + 8 * (thread % 2), 32 * (thread // 2) + bit


def random_nibbles(k: int) -> torch.Tensor:
    """For each of 16 rows and k / 4 groups."""
    values = torch.tensor(list(NIBBLES), dtype=torch.int64)
    return values[torch.randint(0, 6, (16, k // 4))]


def dense_a(kept: torch.Tensor, nibbles: torch.Tensor) -> torch.Tensor:
    """A with the kept values [16, k / 2] at their columns."""
    a = torch.zeros(16, 2 * kept.shape[1], dtype=kept.dtype)
    for row in range(16):
        for group in range(nibbles.shape[1]):
            for which, column in enumerate(NIBBLES[int(nibbles[row, group])]):
                a[row, 4 * group + column] = kept[row, 2 * group + which]
    return a


def run_mma_sp(
    selftest: Selftest,
    kind: str,
    kept: torch.Tensor,
    nibbles: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    selector: int = 0,
    unread: int = 0,
) -> torch.Tensor:
    """D of D = A·B + C, through the fragments. Lanes whose metadata is not read give nibbles
    `unread`."""
    s8 = kind == "s8"
    a_group: Callable[[int, int], Place] = a_group_s8 if s8 else a_group_f16
    b_element: Callable[[int, int], Place] = b_element_s8 if s8 else b_element_f16
    metadata_of = metadata_s8 if s8 else metadata_f16
    per_lane_a, per_lane_b = (16, 16) if s8 else (8, 8)
    a_registers = torch.empty(32, per_lane_a, dtype=kept.dtype)
    b_registers = torch.empty(32, per_lane_b, dtype=b.dtype)
    d_registers = torch.empty(32, 4, dtype=c.dtype)
    metadata = torch.zeros(32, dtype=torch.int64)
    for lane in LANES:
        for i in range(per_lane_a):
            row, first_column = a_group(lane, i)
            a_registers[lane, i] = kept[row, first_column // 2 + i % 2]
        for i in range(per_lane_b):
            b_registers[lane, i] = b[b_element(lane, i)]
        for i in range(4):
            d_registers[lane, i] = c[c_element(lane, i)]
        for bit in range(0, 32, 4):
            place = metadata_of(lane, bit, selector)
            nibble = unread if place is None else int(nibbles[place[0], place[1] // 4])
            metadata[lane] |= nibble << bit
    metadata = torch.where(metadata >= 2**31, metadata - 2**32, metadata).int()
    result = selftest(
        "mma_sp",
        kind,
        selector,
        a_registers.view(torch.int32),
        b_registers.view(torch.int32),
        metadata,
        d_registers,
    )
    d = torch.full_like(c, -12345)
    for lane in LANES:
        for i in range(4):
            d[c_element(lane, i)] = result[lane, i]
    return d


def test_mma_sp_s8(selftest: Selftest) -> None:
    torch.manual_seed(0)
    kept = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    nibbles = random_nibbles(64)
    b = torch.randint(-128, 128, (64, 8), dtype=torch.int8)
    c = torch.randint(-(2**20), 2**20, (16, 8), dtype=torch.int32)
    expected = dense_a(kept, nibbles).int() @ b.int() + c
    assert torch.equal(run_mma_sp(selftest, "s8", kept, nibbles, b, c), expected)


def test_mma_sp_s8_wraps_around(selftest: Selftest) -> None:
    kept = torch.full((16, 32), -128, dtype=torch.int8)
    b = torch.full((64, 8), -128, dtype=torch.int8)
    c = torch.full((16, 8), 2**31 - 1, dtype=torch.int32)
    wrapped = (2**31 - 1 + 32 * 2**14) - 2**32
    d = run_mma_sp(selftest, "s8", kept, random_nibbles(64), b, c)
    assert torch.equal(d, torch.full_like(c, wrapped))


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize(("kind", "dtype"), FLOATING)
def test_mma_sp_floating_point(
    selftest: Selftest, kind: str, dtype: torch.dtype, selector: int
) -> None:
    """On small integers, whose sums every order and rounding gives exactly. The metadata of lanes
    that the selector does not name may be anything."""
    torch.manual_seed(selector)
    kept = torch.randint(-16, 17, (16, 16)).to(dtype)
    nibbles = random_nibbles(32)
    b = torch.randint(-16, 17, (32, 8)).to(dtype)
    c = torch.randint(-1024, 1025, (16, 8)).float()
    expected = dense_a(kept, nibbles).float() @ b.float() + c
    for unread in (0x0, 0x4, 0xF):
        d = run_mma_sp(selftest, kind, kept, nibbles, b, c, selector, unread)
        assert torch.equal(d, expected)


@pytest.mark.parametrize(("kind", "dtype"), FLOATING)
def test_mma_sp_does_not_look_at_what_is_skipped(
    selftest: Selftest, kind: str, dtype: torch.dtype
) -> None:
    """A NaN or an infinity of B that meets no kept value is not there."""
    torch.manual_seed(1)
    kept = torch.randint(1, 17, (16, 16)).to(dtype)
    nibbles = torch.full((16, 8), 0b0100)
    b = torch.randint(-16, 17, (32, 8)).to(dtype)
    expected = dense_a(kept, nibbles).float() @ b.float()
    b[2::4], b[3::4] = float("nan"), float("inf")
    assert torch.equal(run_mma_sp(selftest, kind, kept, nibbles, b, torch.zeros(16, 8)), expected)


@pytest.mark.parametrize("nibble", [0b0000, 0b0101, 0b0001, 0b0110, 0b1011])
@pytest.mark.parametrize(("kind", "k"), [("s8", 64), ("f16", 32), ("bf16", 32)])
def test_undefined_metadata_is_reported(kind: str, k: int, nibble: int) -> None:
    """Equal columns, and columns that descend. On a GPU: undefined behaviour."""
    nibbles = random_nibbles(k)
    nibbles[11, k // 4 - 1] = nibble
    dtype = {"s8": torch.int8, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    kept, b = torch.ones(16, k // 2, dtype=dtype), torch.ones(k, 8, dtype=dtype)
    c = torch.zeros(16, 8, dtype=torch.int32 if kind == "s8" else torch.float32)
    with pytest.raises(RuntimeError, match="undefined metadata"):
        run_mma_sp(emulated(), kind, kept, nibbles, b, c)
