"""What the kernels ask of a mask, which is plain C++, against the mask's definition."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_answers_agree_with_the_definition(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "attention_mask"
    source = Path(__file__).with_name("attention_mask.cpp")
    options = ["-std=c++20", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover"]
    subprocess.run(
        [compiler, *options, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True
    )
    found = subprocess.run([program], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
