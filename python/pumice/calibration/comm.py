"""Sums over the processes of a data-parallel calibration.

Each process of an initialized ``torch.distributed`` group runs the same model on its own share of
the calibration data. Statistics are summed over the group, so every process makes the decisions
that one process with all the data would make. Without a group nothing happens here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def sum_number(value: float) -> float:
    """The sum of the processes' numbers."""
    if not is_distributed():
        return value
    return float(sum_over_processes(torch.tensor([value], dtype=torch.float64, device=_device())))


def smallest(value: int) -> int:
    """The smallest of the processes' integers."""
    if not is_distributed():
        return value
    tensor = torch.tensor([value], dtype=torch.int64, device=_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return int(tensor)


def same_everywhere(tensor: Tensor) -> Tensor:
    """Process 0's tensor for all, in place: rounding may differ between kinds of devices."""
    if is_distributed():
        dist.broadcast(tensor, 0)
    return tensor


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
