"""The kernels of every instruction set give the same bits, integer sums and float32 alike."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pumice import _C

ISAS = ("portable", "avx2", "avx512vnni", "avx512bf16")
PROGRAM = Path(__file__).parent / "isa_digest.py"


@functools.cache
def digest(isa: str) -> dict[str, str]:
    finished = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env={**os.environ, "PUMICE_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    found: dict[str, str] = json.loads(finished.stdout.splitlines()[-1])
    return found


def runnable(isa: str) -> bool:
    return ISAS.index(isa) <= ISAS.index(_C.cpu_isa_detected())


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_lowers_the_instruction_set(isa: str) -> None:
    expected = isa if runnable(isa) else _C.cpu_isa_detected()
    assert digest(isa)["isa"] == expected


@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize("op", ["quantize", "linear", "mixed"])
def test_bits_agree(isa: str, op: str) -> None:
    if not runnable(isa):
        pytest.skip(f"this machine has no {isa}")
    assert digest(isa)[op] == digest("portable")[op]
