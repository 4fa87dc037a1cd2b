"""How sparse24_gemm is planned: the tiles and the choice among them, which are plain C++."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_plans_hold_their_promises(tmp_path: Path) -> None:
    """Every plan fits its device, and has room for the sums that its blocks exchange."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "sparse24_plans"
    source = Path(__file__).with_name("sparse24_plans.cpp")
    command = [compiler, "-std=c++20", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    found = subprocess.run([program], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
