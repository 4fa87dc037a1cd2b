"""The int4 kernels of every instruction set, against the float64 reference.

Their sums differ in the last bits of float32. Each runs in a process of its own: it chooses once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pumice import _C

TESTS = Path(__file__).parent.parent / "ops"
FILES = ("test_int4_linear.py", "test_int4_pack.py")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512vnni", "avx512bf16"])
def test_against_the_reference(isa: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu"]
        + [str(TESTS / name) for name in FILES],
        env={**os.environ, "PUMICE_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert " passed" in finished.stdout


def test_the_environment_is_obeyed() -> None:
    """Or the test above would test one instruction set three times."""
    finished = subprocess.run(
        [sys.executable, "-c", "from pumice import _C; print(_C.cpu_isa())"],
        env={**os.environ, "PUMICE_CPU_ISA": "avx2"},
        capture_output=True,
        text=True,
        check=True,
    )
    order = ("portable", "avx2", "avx512vnni", "avx512bf16")
    expected = min("avx2", _C.cpu_isa_detected(), key=order.index)
    assert finished.stdout.strip() == expected
