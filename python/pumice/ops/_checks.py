"""Checks of arguments, shared by the operators.

Every message names the operator, the argument, what came and what is accepted. The checks look at
metadata only (they cost no synchronization and trace away under ``torch.compile``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.ops import _library

FLOATING = (torch.float32, torch.float16, torch.bfloat16)

# Beyond this many input features an int32 sum of products of two int8 values could overflow.
MAX_INT8_K = (1 << 17) - 1


def shape_of(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def check_tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, not {type(value).__name__}")


def check_kernels(op: str, tensor: Tensor) -> None:
    if tensor.device.type not in _library.devices:
        raise _library.no_kernel(op, tensor.device)


def check_dtype(op: str, name: str, tensor: Tensor, accepted: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in accepted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise TypeError(f"{op}: {name} must be {names}, not {str(tensor.dtype)[6:]}")


def check_same_device(op: str, name: str, tensor: Tensor, first: str, reference: Tensor) -> None:
    if tensor.device != reference.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, but {first} is on {reference.device}; "
            "all tensors must be on one device"
        )


def check_input(op: str, name: str, x: Any, accepted: tuple[torch.dtype, ...]) -> None:
    """An input of shape [..., K], K >= 1, on a device that has kernels."""
    check_tensor(op, name, x)
    check_dtype(op, name, x, accepted)
    if x.dim() < 1:
        raise ValueError(f"{op}: {name} must have shape [..., K], but it is a scalar")
    if x.shape[-1] < 1:
        raise ValueError(f"{op}: the last dimension of {name} is empty, shape {shape_of(x)}")
    check_kernels(op, x)


def check_vector(
    op: str,
    name: str,
    vector: Any,
    sizes: tuple[int, ...],
    accepted: tuple[torch.dtype, ...],
    first: str,
    reference: Tensor,
) -> Tensor:
    """A vector with one of the given lengths; returned contiguous, as the kernels read it."""
    check_tensor(op, name, vector)
    check_dtype(op, name, vector, accepted)
    if vector.dim() != 1 or vector.shape[0] not in sizes:
        lengths = " or ".join(f"[{size}]" for size in dict.fromkeys(sizes))
        raise ValueError(f"{op}: {name} must have shape {lengths}, not {shape_of(vector)}")
    check_same_device(op, name, vector, first, reference)
    contiguous: Tensor = vector.contiguous()
    return contiguous


def check_threshold(op: str, threshold: Any) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, torch.SymFloat)):
        raise TypeError(f"{op}: threshold must be a float, not {type(threshold).__name__}")
    if not threshold > 0:  # refuses NaN too
        raise ValueError(f"{op}: threshold must be positive (math.inf is allowed), not {threshold}")


def check_int8_weight(
    op: str, qweight: Any, weight_scale: Any, bias: Any, first: str, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """An int8 weight [N, K] with its scale [N] or [1] and its bias [N], for the input x [..., K].

    Returns scale and bias, contiguous.
    """
    check_tensor(op, "qweight", qweight)
    check_dtype(op, "qweight", qweight, (torch.int8,))
    if qweight.dim() != 2 or 0 in qweight.shape:
        raise ValueError(
            f"{op}: qweight must have shape [N, K] with N, K >= 1, not {shape_of(qweight)}"
        )
    n, k = qweight.shape
    if k > MAX_INT8_K:
        raise ValueError(
            f"{op}: qweight has K = {k} input features; beyond {MAX_INT8_K} int32 sums can overflow"
        )
    if x.shape[-1] != k:
        raise ValueError(
            f"{op}: the last dimension of {first} must be K = {k}, that of qweight "
            f"{shape_of(qweight)}, but {first} has shape {shape_of(x)}"
        )
    check_same_device(op, "qweight", qweight, first, x)
    if isinstance(weight_scale, Tensor) and weight_scale.requires_grad:
        raise ValueError(
            f"{op}: weight_scale requires a gradient, but quantized weights are frozen; detach it"
        )
    weight_scale = check_vector(
        op, "weight_scale", weight_scale, (n, 1), (torch.float32,), first, x
    )
    if bias is not None:
        bias = check_vector(op, "bias", bias, (n,), FLOATING, first, x)
    return weight_scale, bias
