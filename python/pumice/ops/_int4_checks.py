"""Checks of packed weights, shared by the int4 operators. They look at metadata only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.ops._checks import (
    FLOATING,
    check_dtype,
    check_kernels,
    check_same_device,
    check_tensor,
    check_vector,
    shape_of,
)

BITS = (2, 3, 4, 8)
GROUP_MULTIPLE = 16


def words(k: int, bits: int) -> int:
    """int32 words of a packed row."""
    return (k * bits + 31) // 32


def groups(k: int, group_size: int) -> int:
    """Groups of a row."""
    return 1 if group_size == -1 else (k + group_size - 1) // group_size


def check_bits(op: str, bits: Any) -> None:
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"{op}: bits must be 2, 3, 4 or 8, not {bits!r}")


def check_group_size(op: str, group_size: Any) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"{op}: group_size must be an int, not {type(group_size).__name__}")
    if group_size != -1 and (group_size <= 0 or group_size % GROUP_MULTIPLE != 0):
        raise ValueError(
            f"{op}: group_size must be -1 (one group for each row) or a positive multiple of "
            f"{GROUP_MULTIPLE}, not {group_size}"
        )


def check_matrix(
    op: str, name: str, matrix: Any, accepted: tuple[torch.dtype, ...], x: Tensor
) -> None:
    """A matrix of one of the dtypes, on the device of x."""
    check_tensor(op, name, matrix)
    check_dtype(op, name, matrix, accepted)
    if matrix.dim() != 2:
        raise ValueError(f"{op}: {name} must be a matrix, not of shape {shape_of(matrix)}")
    check_same_device(op, name, matrix, "x", x)


def shaped(op: str, name: str, matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix, contiguous, if its shape is right."""
    if matrix.shape != (rows, columns):
        raise ValueError(
            f"{op}: {name} must have shape [{rows}, {columns}], not {shape_of(matrix)}"
        )
    contiguous: Tensor = matrix.contiguous()
    return contiguous


def check_qweight(op: str, qweight: Any, k: int, bits: Any) -> None:
    """A packed weight of rows of k values."""
    check_tensor(op, "qweight", qweight)
    check_dtype(op, "qweight", qweight, (torch.int32,))
    check_kernels(op, qweight)
    check_bits(op, bits)
    if k < 1:
        raise ValueError(f"{op}: k must be at least 1, not {k}")
    if qweight.dim() != 2 or qweight.shape[0] < 1 or qweight.shape[1] != words(k, bits):
        raise ValueError(
            f"{op}: qweight must have shape [N, {words(k, bits)}] for K = {k} values of {bits} "
            f"bits, N >= 1, not {shape_of(qweight)}"
        )
    if not qweight.is_contiguous():
        raise ValueError(
            f"{op}: qweight must be contiguous (a copy for every call would cost more than the "
            "call); pass qweight.contiguous(), made once"
        )


def check_weight(
    op: str,
    qweight: Any,
    scales: Any,
    zeros: Any,
    g_idx: Any,
    k: int,
    group_size: Any,
    bits: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A packed weight of K input features. Returns scales, zeros and g_idx, contiguous."""
    check_qweight(op, qweight, k, bits)
    check_group_size(op, group_size)
    check_tensor(op, "scales", scales)
    check_dtype(op, "scales", scales, FLOATING)
    check_same_device(op, "scales", scales, "qweight", qweight)
    n = qweight.shape[0]
    if g_idx is not None:
        g_idx = check_vector(op, "g_idx", g_idx, (k,), (torch.int32,), "qweight", qweight)
        if scales.dim() != 2 or scales.shape[0] != n or scales.shape[1] < 1:
            raise ValueError(
                f"{op}: scales must have shape [{n}, G], G >= 1, not {shape_of(scales)}"
            )
    elif scales.shape != (n, groups(k, group_size)):
        raise ValueError(
            f"{op}: scales must have shape [{n}, {groups(k, group_size)}] for K = {k} in groups "
            f"of {group_size}, not {shape_of(scales)}"
        )
    if zeros is not None:
        check_tensor(op, "zeros", zeros)
        check_dtype(op, "zeros", zeros, (torch.uint8, scales.dtype))
        check_same_device(op, "zeros", zeros, "qweight", qweight)
        if zeros.shape != scales.shape:
            raise ValueError(
                f"{op}: zeros must have the shape of scales {shape_of(scales)}, not "
                f"{shape_of(zeros)}"
            )
        zeros = zeros.contiguous()
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{op}: {name} requires a gradient, but quantized weights are frozen; detach it"
            )
    return scales.contiguous(), zeros, g_idx
