"""How flash_forward is planned: tiles, parts of keys and offsets, which are plain C++."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_plans_hold_their_promises(tmp_path: Path) -> None:
    """Room for every block and part, parts that know nothing of the batch, 64-bit offsets."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "attention_plans"
    source = Path(__file__).with_name("attention_plans.cpp")
    command = [compiler, "-std=c++20", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    found = subprocess.run([program], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
