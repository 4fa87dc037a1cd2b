"""No kernel reads past an input, not even bytes that it would ignore."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "guarded_inputs.py"


def run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env={**os.environ, "PUMICE_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512vnni", "avx512bf16"])
def test_reads_stay_inside(isa: str) -> None:
    finished = run(isa)
    assert (finished.returncode, finished.stdout) == (0, "done\n"), finished.stderr


def test_a_read_past_the_end_is_caught() -> None:
    assert run("portable", "past-the-end").returncode == -signal.SIGSEGV
