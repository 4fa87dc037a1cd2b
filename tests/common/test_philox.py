"""The random numbers, against the vectors published with them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from sampling_reference import philox4x32

ROOT = Path(__file__).parents[2]


def test_published_vectors(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "philox"
    source = Path(__file__).with_name("philox.cpp")
    options = ["-std=c++20", "-O1", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *options, str(source), "-o", str(program)], check=True)
    found = subprocess.run([program], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_reference_too() -> None:
    """What the tests of the operators compare with."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert philox4x32(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    assert philox4x32([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
