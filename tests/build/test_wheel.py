"""The wheel: built from the tree, installed into an empty environment, used there."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import torch
import pumice
x = torch.randn(5, 33)
q, scale, _ = pumice.ops.int8_quantize(torch.randn(7, 33))
y = pumice.ops.int8_mixed_linear(x, q, scale)
error = (y - x @ (q * scale[:, None]).t()).norm() / y.norm()
assert error < 0.02, error
print(pumice.doctor())
print("from", pumice.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without isolation in the tree's own build folder, so only what changed is compiled."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out)]
    done = subprocess.run(
        [*command, "--no-build-isolation", str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "pumice/lib/libpumice_cpu.so" in names
    assert "pumice/py.typed" in names
    assert any(name.startswith("pumice/_C.") and name.endswith(".so") for name in names)
    assert not [n for n in names if n.startswith(("tests", "bench", "csrc"))]
    assert wheel.stat().st_size < 100e6


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory) -> Path:
    """An environment that has the wheel and, by a path file, this one's torch, but not pumice."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", code], text=True).strip())
    zipfile.ZipFile(wheel).extractall(site)
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_works_in_a_clean_environment(clean_python, tmp_path):
    done = subprocess.run(
        [clean_python, "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert str(clean_python.parents[1]) in done.stdout, "used another installation of pumice"
    assert "0.1.0" in done.stdout


def test_unbuilt_checkout_says_how_to_build(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import pumice"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT / 'python'}:{sysconfig.get_path('purelib')}"},
    )
    assert done.returncode != 0
    assert "pip install" in done.stderr
