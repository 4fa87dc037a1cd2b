"""doctor, the build's own account of itself, and what happens where something is missing."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import pumice
from pumice import _C
from pumice.doctor import Gpu, runs_on
from pumice.ops import _library

DOCTOR = sys.modules["pumice.doctor"]  # the attribute of pumice is the function


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_report_names_what_is_here():
    diagnosis = pumice.doctor()
    text = str(diagnosis)
    assert f"pumice        {pumice.__version__}" in text
    assert torch.__version__ in text
    for isa in _C.build_info()["cpu_instruction_sets"]:
        assert isa in text
    for kernel in _C.kernels():
        assert kernel["digest"] in text
    assert {kernel["device"] for kernel in diagnosis.kernels} >= {"cpu"}
    assert json.loads(json.dumps(diagnosis.to_dict()))["cpu"]["threads"] == torch.get_num_threads()


def test_lowered_instruction_set_is_shown():
    code = "import pumice; print(pumice.doctor())"
    result = run(code, PUMICE_CPU_ISA="portable")
    assert result.returncode == 0, result.stderr
    detected = _C.cpu_isa_detected()
    if detected != "portable":
        assert f"portable (PUMICE_CPU_ISA=portable; this machine has {detected})" in result.stdout


def test_missing_packages_come_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(DOCTOR, "_version_of", lambda name: None)
    assert "safetensors   not installed (pip install 'pumice[hf]')" in str(pumice.doctor())


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
def test_a_cpu_build_of_torch_says_why_there_is_no_cuda():
    assert "is a CPU-only build (install a CUDA build of torch" in str(pumice.doctor())
    assert "cuda" not in _library.devices


def test_gpus_are_listed_with_a_verdict(monkeypatch):
    gpus = [Gpu("H200", (9, 0), 140_000_000_000, None), Gpu("V100", (7, 0), 16_000_000_000, "old")]
    monkeypatch.setattr(DOCTOR, "_gpus", lambda: gpus)
    text = str(pumice.doctor())
    assert "H200, sm 9.0, 140 GB: runs pumice's kernels" in text
    assert "V100, sm 7.0, 16 GB: no: old" in text


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (["80-real", "90"], (8, 0), True),
        (["80-real", "90"], (8, 9), True),  # the same generation, newer
        (["80-real", "90"], (7, 5), False),
        (["80-real", "90"], (9, 0), True),
        (["80-real", "90"], (12, 0), True),  # from the PTX of 90
        (["80-real", "90-real"], (12, 0), False),
        (["90a-real"], (9, 0), True),
        (["90a"], (10, 0), False),  # architecture-specific PTX does not carry over
        (["86-real"], (8, 0), False),
        (["75-virtual"], (8, 0), True),
        (["120"], (12, 0), True),
        ([], (8, 0), False),
    ],
)
def test_which_gpus_an_architecture_list_serves(architectures, capability, expected):
    assert runs_on(architectures, capability) is expected


# ---- what is missing says so at the first call, never at import


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", r"int8_quantize: no CUDA kernels, because .*(CPU-only|no nvcc)"),
        ("mps", r"int8_quantize: pumice has no kernels for device 'mps'; it runs on cpu"),
    ],
)
def test_a_device_without_kernels(monkeypatch, device, message):
    if device in _library.devices:
        pytest.skip("this device has kernels here")

    elsewhere = type("Elsewhere", (torch.Tensor,), {"device": torch.device(device)})
    x = torch.randn(2, 3).as_subclass(elsewhere)
    with pytest.raises(RuntimeError, match=message):
        pumice.ops.int8_quantize(x)


def test_a_cuda_library_that_does_not_load_breaks_nothing(tmp_path, monkeypatch):
    (tmp_path / "libpumice_cuda.so").write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    reason = _library._load_cuda(tmp_path)
    assert "libpumice_cuda.so does not load beside torch" in reason


def test_a_cuda_torch_without_the_cuda_library_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no nvcc was found" in _library._load_cuda(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.0", raising=False)
    assert "is a ROCm build" in _library._load_cuda(tmp_path)


def test_an_unbuilt_checkout_says_how_to_build():
    source = Path(pumice.__file__).parent
    result = run(
        f"""
        import sys
        # The source tree alone, as after git clone: no compiled module beside it.
        sys.meta_path = [f for f in sys.meta_path if "scikit" not in type(f).__module__
                         and "editable" not in type(f).__module__]
        sys.modules["pumice._C"] = None
        sys.path.insert(0, {str(source.parent)!r})
        import pumice
        """
    )
    assert result.returncode != 0
    assert "ImportError: pumice is not built" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


def test_missing_or_broken_cpu_library(tmp_path):
    with pytest.raises(ImportError, match=r"libpumice_cpu\.so is missing.*pip install"):
        _library._load_cpu(tmp_path)
    (tmp_path / "libpumice_cpu.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"does not load beside torch .*2\.10 or newer"):
        _library._load_cpu(tmp_path)


def test_importing_pumice_imports_none_of_the_extras():
    """They are slow to import, and may be absent."""
    result = run(
        """
        import sys, pumice
        extras = {"transformers", "safetensors", "accelerate", "typer", "rich", "matplotlib"}
        print(sorted(extras & set(sys.modules)))
        """
    )
    assert result.stdout.strip() == "[]", result.stderr
