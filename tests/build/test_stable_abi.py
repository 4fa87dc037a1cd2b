"""One binary for every torch: nothing but LibTorch's stable ABI may be needed."""

from __future__ import annotations

import subprocess
from pathlib import Path


def run(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def undefined_symbols(path: Path) -> list[str]:
    return [line.split()[-1] for line in run("nm", "-D", "--undefined-only", path).splitlines()]


def needed_libraries(path: Path) -> list[str]:
    lines = run("readelf", "-d", path).splitlines()
    return [line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line]


def test_libraries_need_no_cpp_symbol_of_torch(libraries):
    assert "libpumice_cpu" in libraries
    for path in libraries.values():
        symbols = undefined_symbols(path)
        # Mangled names in the namespaces at, c10 and torch: torch's unstable C++ interface.
        unstable = [s for s in symbols if s.startswith(("_ZN2at", "_ZN3c10", "_ZN5torch"))]
        unstable += [s for s in symbols if s.startswith(("_ZNK2at", "_ZNK3c10", "_ZNK5torch"))]
        assert not unstable, f"{path.name} needs {unstable[:5]}"
        assert any(s.startswith(("aoti_torch_", "torch_")) for s in symbols), path.name


def test_libraries_name_torch_and_no_cuda_runtime(libraries):
    for path in libraries.values():
        needed = needed_libraries(path)
        assert "libtorch_cpu.so" in needed, path.name
        assert not [name for name in needed if "cudart" in name], "cudart must be static"


def test_module_knows_nothing_of_torch(module):
    assert not [name for name in needed_libraries(module) if "torch" in name or "c10" in name]


def test_no_paths_of_the_build_machine(libraries, module):
    source_tree = str(Path(__file__).parents[2]).encode() + b"/csrc"
    for path in (*libraries.values(), module):
        assert source_tree not in path.read_bytes(), path.name
