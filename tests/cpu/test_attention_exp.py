"""The stated errors of attention's exponential and hyperbolic tangent of whole registers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pumice import _C

ROOT = Path(__file__).parents[2]
ISAS = ("portable", "avx2", "avx512vnni", "avx512bf16")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma"]
FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512vnni": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}


@pytest.mark.parametrize("isa", ISAS)
def test_stated_errors(isa: str, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if ISAS.index(isa) > ISAS.index(_C.cpu_isa_detected()):
        pytest.skip(f"this machine has no {isa}")
    program = tmp_path / "attention_exp"
    source = Path(__file__).with_name("attention_exp.cpp")
    options = ["-std=c++20", "-O2", "-ffp-contract=off", f"-DPUMICE_ISA={isa}", *FLAGS[isa]]
    subprocess.run(
        [compiler, *options, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True
    )
    found = subprocess.run([program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
