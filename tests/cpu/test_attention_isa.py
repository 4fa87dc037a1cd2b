"""The attention kernels of every instruction set, forward and backward, against float64.

Their sums differ in the last bits of float32. Each runs in a process of its own: it chooses once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent / "ops"
FILES = ("test_attention_forward.py", "test_attention_backward.py")
# A tenth of the pairs of options, and the larger cases.
CHOSEN = "cpu and (larger or wide or cpu-2) and not beyond"


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512vnni", "avx512bf16"])
@pytest.mark.parametrize("file", FILES)
def test_against_the_reference(isa: str, file: str) -> None:
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            CHOSEN,
            TESTS / file,
        ],
        env={**os.environ, "PUMICE_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert " passed" in finished.stdout
