"""The 2:4 kernels of every instruction set, against the oracle; int8 products to the bit.

Each runs in a process of its own: it chooses once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent / "ops"
FILES = (
    "test_sparse24_weight.py",
    "test_sparse24_linear.py",
    "test_sparse24_int8.py",
    "test_sparse24_cpu_panels.py",
    "test_sparse24_int4_panels.py",
)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512vnni", "avx512bf16"])
@pytest.mark.parametrize("file", FILES)
def test_against_the_oracle(isa: str, file: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         "-k", "not emulated and not cuda", TESTS / file],
        env={**os.environ, "PUMICE_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert " passed" in finished.stdout
