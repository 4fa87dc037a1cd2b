"""Tokens, and the bits of probabilities, are the same on every instruction set.

Each runs in a process of its own: it chooses once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("sampling_digest.py")


def digest_of(isa: str) -> tuple[str, str]:
    found = subprocess.run(
        [sys.executable, PROGRAM],
        env={**os.environ, "PUMICE_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    return result["isa"], result["digest"]


def test_every_instruction_set_agrees() -> None:
    found = dict(digest_of(isa) for isa in ("portable", "avx2", "avx512vnni"))
    assert "portable" in found
    assert len(set(found.values())) == 1, found
