"""The installed binaries, which the tests of this folder look into."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from pumice import _C


@pytest.fixture(scope="session")
def module() -> Path:
    return Path(str(_C.__file__))


@pytest.fixture(scope="session")
def libraries(module: Path) -> dict[str, Path]:
    """libpumice_*.so by name."""
    return {path.stem: path for path in sorted((module.parent / "lib").glob("libpumice_*.so"))}


@pytest.fixture(scope="session")
def cuda_library(libraries: dict[str, Path]) -> Path:
    if _C.build_info()["cuda_compiler"] is None:
        pytest.skip("built without nvcc: there is no CUDA library to look into")
    return libraries["libpumice_cuda"]


@pytest.fixture(scope="session")
def cuobjdump() -> Path:
    """NVIDIA's disassembler, which the extra [test] brings from its own package."""
    found = list(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    assert found, "cuobjdump is missing: pip install 'pumice[test]'"
    return found[0]
