"""What is installed, what was built, what this machine can run, and why not."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pumice import _C
from pumice.ops import _library

# Packages that parts of pumice use when they are installed, and the extra that brings them.
_OPTIONAL = {
    "safetensors": "hf",
    "transformers": "hf",
    "accelerate": "hf",
    "gguf": "hf",
    "typer": "cli",
    "rich": "cli",
    "matplotlib": "cli",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees; ``problem`` says why pumice's kernels do not run on it, if so."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    problem: str | None


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`doctor`; ``str`` of it is the report that ``pumice doctor`` prints."""

    versions: dict[str, str]
    build: dict[str, Any]
    kernels: list[dict[str, Any]]
    cpu: dict[str, Any]
    gpus: list[Gpu]
    cuda_driver: str | None
    cuda_unavailable: str | None
    optional: dict[str, str | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n\n".join(
            [
                _section("Versions", list(self.versions.items())),
                _section("Built", _build_lines(self.build)),
                _section("Kernels", [(k["name"], _kernel_line(k)) for k in self.kernels]),
                _section("This machine's CPU", _cpu_lines(self.cpu)),
                _section("CUDA", self._cuda_lines()),
                _section("Optional packages", list(map(_optional_line, self.optional.items()))),
            ]
        )

    def _cuda_lines(self) -> list[tuple[str, str]]:
        loaded = "loaded" if self.cuda_unavailable is None else f"no: {self.cuda_unavailable}"
        lines = [
            ("kernels", loaded),
            ("driver", self.cuda_driver or "none found (no libcuda.so.1): a GPU needs one"),
        ]
        for index, gpu in enumerate(self.gpus):
            capability = ".".join(map(str, gpu.capability))
            verdict = "runs pumice's kernels" if gpu.problem is None else f"no: {gpu.problem}"
            memory = f"{gpu.memory_bytes / 1e9:.0f} GB"
            lines.append((f"GPU {index}", f"{gpu.name}, sm {capability}, {memory}: {verdict}"))
        if not self.gpus:
            lines.append(("GPUs", "none that torch can use"))
        return lines


def doctor() -> Diagnosis:
    """Look at the installation and the machine. ``print(pumice.doctor())`` shows everything.

    Nothing is raised for what is missing; that is what the report is for.
    """
    from pumice import __version__

    return Diagnosis(
        versions={
            "pumice": f"{__version__} ({Path(__file__).parent})",
            "torch": torch.__version__,
            "torch's CUDA": torch.version.cuda or "none (a build without CUDA)",
            "python": f"{platform.python_version()} ({sys.executable})",
            "system": platform.platform(),
        },
        build=dict(_C.build_info()),
        kernels=[dict(kernel) for kernel in _C.kernels()],
        cpu={
            "model": _cpu_model(),
            "instruction_set": _C.cpu_isa(),
            "instruction_set_detected": _C.cpu_isa_detected(),
            "instruction_set_requested": os.environ.get("PUMICE_CPU_ISA"),
            "threads": torch.get_num_threads(),
        },
        gpus=_gpus(),
        cuda_driver=_cuda_driver(),
        cuda_unavailable=_library.cuda_unavailable,
        optional={name: _version_of(name) for name in _OPTIONAL},
    )


def runs_on(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code built for CMake's architectures ("80-real", "90", "90a-real") runs on a GPU.

    Machine code runs on its own generation, from its minor version up ("a": on that one alone). An
    entry without "-real" holds PTX too, which the driver compiles for anything newer.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
        if match is None:
            continue
        compiled = int(match[1]), int(match[2])
        if match[3]:
            if compiled == capability:
                return True
            continue
        has_machine_code, has_ptx = match[4] != "-virtual", match[4] != "-real"
        if has_machine_code and compiled[0] == capability[0] and compiled[1] <= capability[1]:
            return True
        if has_ptx and compiled <= capability:
            return True
    return False


def _gpus() -> list[Gpu]:
    if not torch.cuda.is_available():
        return []
    architectures = _C.build_info()["cuda_architectures"]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        problem = None
        if _library.cuda_unavailable is not None:
            problem = "the CUDA kernels are not loaded (see above)"
        elif not runs_on(architectures, capability):
            problem = f"the kernels were built for {', '.join(architectures)}"
        found.append(Gpu(properties.name, capability, properties.total_memory, problem))
    return found


def _cuda_driver() -> str | None:
    """The newest CUDA version that the installed driver supports, None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "found, but it does not answer"
    return f"supports CUDA up to {version.value // 1000}.{version.value % 1000 // 10}"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.machine()


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _section(title: str, lines: list[tuple[str, str]]) -> str:
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join([title, *(f"  {name.ljust(width)}  {value}" for name, value in lines)])


def _build_lines(build: dict[str, Any]) -> list[tuple[str, str]]:
    cuda = build["cuda_compiler"]
    return [
        ("C++ compiler", build["compiler"]),
        ("beside torch", f"{build['torch_built_beside']}, runs on {build['torch_abi_target']}+"),
        ("CPU instruction sets", ", ".join(build["cpu_instruction_sets"])),
        ("CUDA compiler", cuda or "none: the CUDA kernels were not built"),
        ("CUDA architectures", ", ".join(build["cuda_architectures"]) or "none"),
    ]


def _kernel_line(kernel: dict[str, Any]) -> str:
    where = f"{kernel['device']} ({', '.join(kernel['architectures'])})"
    return f"{where}  digest {kernel['digest']}"


def _cpu_lines(cpu: dict[str, Any]) -> list[tuple[str, str]]:
    chosen = cpu["instruction_set"]
    if chosen != cpu["instruction_set_detected"]:
        chosen += (
            f" (PUMICE_CPU_ISA={cpu['instruction_set_requested']}; this machine has "
            f"{cpu['instruction_set_detected']})"
        )
    return [
        ("model", cpu["model"]),
        ("kernels run on", chosen),
        ("threads", str(cpu["threads"])),
    ]


def _optional_line(entry: tuple[str, str | None]) -> tuple[str, str]:
    name, version = entry
    return name, version or f"not installed (pip install 'pumice[{_OPTIONAL[name]}]')"
