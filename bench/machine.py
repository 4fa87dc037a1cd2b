"""What the machine can do at best: the numbers that floors are computed from.

Bandwidth is measured in the run itself. Peak operations come from the vendor's data sheet
for the GPUs listed; for others and for CPUs no operation floor is given, but where a benchmark
says so the rate of torch's own matrix product takes its place.
"""

from __future__ import annotations

import functools
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# Dense tensor-core peaks, operations per second: (16-bit, int8).
GPU_PEAKS: dict[str, tuple[float, float]] = {
    "H200": (989e12, 1979e12),
    "H100": (989e12, 1979e12),
    "A100": (312e12, 624e12),
    "L40S": (362e12, 733e12),
    "L4": (121e12, 242e12),
}


@dataclass(frozen=True)
class Machine:
    """A device and its measured memory bandwidth (bytes per second)."""

    device: str
    name: str
    threads: int
    bandwidth: float
    cache_bytes: int
    peak_16bit: float | None
    peak_int8: float | None

    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def floor_us(self, moved: int, operations: int, *, int8: bool) -> float:
        """The larger of bytes over bandwidth and operations over peak, in microseconds."""
        peak = self.peak_int8 if int8 else self.peak_16bit
        by_operations = operations / peak if peak else 0.0
        return max(moved / self.bandwidth, by_operations) * 1e6


@functools.cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of torch's own product of two 2048² matrices, the best of several: what
    stands in for the peak of a CPU, whose data sheet states none."""
    a, b = (torch.ones(2048, 2048, dtype=dtype, device=device) for _ in range(2))
    return 2 * 2048**3 / _seconds(lambda: a @ b, device)


def describe(device: torch.device) -> Machine:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        peaks = next((v for k, v in GPU_PEAKS.items() if k in properties.name), (None, None))
        return Machine(
            "cuda", properties.name, 0, _bandwidth(device), properties.L2_cache_size, *peaks
        )
    isa = _active_isa()
    name = f"{_cpu_name()} {torch.get_num_threads()} threads {isa}"
    return Machine(
        "cpu", name, torch.get_num_threads(), _bandwidth(device), _last_level_cache(), None, None
    )


def _active_isa() -> str:
    from pumice import _C

    return str(_C.cpu_isa())


def _bandwidth(device: torch.device) -> float:
    """Bytes a second, the best of several: a copy of 1 GB (read plus written) on a GPU; on a CPU
    the faster of a copy and a sum of 256 MB, for writing costs a read of the line as well."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    best = 2 * size / _seconds(lambda: target.copy_(source), device)
    if device.type == "cpu":
        best = max(best, size / _seconds(lambda: source.sum(), device))
    return best


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _last_level_cache() -> int:
    """Bytes of the largest cache the first core sees; 32 MB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=32 << 20)
