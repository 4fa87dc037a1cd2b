"""Checks of 2:4 weights, shared by the sparse24 operators."""

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
from pumice.ops._int4_checks import groups, words

DTYPES = (*FLOATING, torch.int8)

# Of the int4 weight's groups, in columns of W.
GROUP_MULTIPLE = 32


def meta_bytes(k: int) -> int:
    """Bytes of a row of meta."""
    return (k + 31) // 32 * 4


def check_dense(op: str, name: str, w: Any) -> None:
    """A matrix [N, K], K a multiple of 4, on a device that has kernels."""
    check_tensor(op, name, w)
    check_dtype(op, name, w, DTYPES)
    if w.dim() != 2 or 0 in w.shape:
        raise ValueError(f"{op}: {name} must have shape [N, K] with N, K >= 1, not {shape_of(w)}")
    if w.shape[1] % 4 != 0:
        raise ValueError(
            f"{op}: {name} must have K a multiple of 4 columns, whole groups of four, not "
            f"K = {w.shape[1]}"
        )
    check_kernels(op, w)


def check_is_sparse24(op: str, name: str, w: Tensor) -> None:
    """Refuse a matrix with a group of more than two nonzeros, naming the first.

    On a GPU this waits for the device.
    """
    crowded = ((w != 0).view(w.shape[0], -1, 4).sum(-1) > 2).nonzero()
    if len(crowded) == 0:
        return
    row, group = crowded[0].tolist()
    four = w[row, 4 * group : 4 * group + 4].tolist()
    more = f" ({len(crowded)} groups do)" if len(crowded) > 1 else ""
    raise ValueError(
        f"{op}: {name} is not 2:4: row {row}, group {group} (columns {4 * group} to "
        f"{4 * group + 3}) holds more than two nonzeros, {four}{more}; prune it first, "
        "for example with pumice.Magnitude"
    )


def check_meta(op: str, meta: Any, n: int, k: int, first: str, reference: Tensor) -> Tensor:
    """The places of N rows of K columns, contiguous."""
    check_tensor(op, "meta", meta)
    check_dtype(op, "meta", meta, (torch.uint8,))
    if meta.shape != (n, meta_bytes(k)):
        raise ValueError(
            f"{op}: meta must have shape [{n}, {meta_bytes(k)}] for {n} rows of K = {k} columns, "
            f"not {shape_of(meta)}"
        )
    check_same_device(op, "meta", meta, first, reference)
    contiguous: Tensor = meta.contiguous()
    return contiguous


def check_values(
    op: str, values: Any, meta: Any, accepted: tuple[torch.dtype, ...]
) -> tuple[int, int, Tensor]:
    """A compressed matrix: N, K and its meta, contiguous."""
    check_tensor(op, "values", values)
    check_dtype(op, "values", values, accepted)
    if values.dim() != 2 or 0 in values.shape or values.shape[1] % 2 != 0:
        raise ValueError(
            f"{op}: values must have shape [N, K/2], N >= 1 and K a multiple of 4, not "
            f"{shape_of(values)}"
        )
    check_kernels(op, values)
    n, k = values.shape[0], 2 * values.shape[1]
    return n, k, check_meta(op, meta, n, k, "values", values)


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous (a copy for every call would cost more than the "
            f"call); pass {name}.contiguous(), made once"
        )


def check_columns(op: str, name: str, x: Tensor, k: int, weight: str) -> None:
    if x.shape[-1] != k:
        raise ValueError(
            f"{op}: the last dimension of {name} must be K = {k}, twice the columns of {weight}, "
            f"but {name} has shape {shape_of(x)}"
        )


def check_bias(op: str, bias: Any, n: int, first: str, x: Tensor) -> Tensor | None:
    return None if bias is None else check_vector(op, "bias", bias, (n,), FLOATING, first, x)


def check_group_size(op: str, group_size: Any) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"{op}: group_size must be an int, not {type(group_size).__name__}")
    if group_size != -1 and (group_size <= 0 or group_size % GROUP_MULTIPLE != 0):
        raise ValueError(
            f"{op}: group_size must be -1 (one group for each row) or a positive multiple of "
            f"{GROUP_MULTIPLE} columns, not {group_size}"
        )


def check_packed(op: str, qvalues: Any, scales: Any, k: int, group_size: int, bits: int) -> None:
    """Shapes of a packed weight whose rows keep K/2 of K columns."""
    check_tensor(op, "qvalues", qvalues)
    check_dtype(op, "qvalues", qvalues, (torch.int32,))
    if qvalues.dim() != 2 or qvalues.shape[0] < 1 or qvalues.shape[1] != words(k // 2, bits):
        raise ValueError(
            f"{op}: qvalues must have shape [N, {words(k // 2, bits)}] for {k // 2} kept values of "
            f"{bits} bits, half of K = {k}, N >= 1, not {shape_of(qvalues)}"
        )
    check_contiguous(op, "qvalues", qvalues)
    check_tensor(op, "scales", scales)
    n = qvalues.shape[0]
    if scales.shape != (n, groups(k, group_size)):
        raise ValueError(
            f"{op}: scales must have shape [{n}, {groups(k, group_size)}] for K = {k} in groups of "
            f"{group_size}, not {shape_of(scales)}"
        )


def kept_group_size(group_size: int) -> int:
    """Kept weights of a group of so many columns."""
    return -1 if group_size == -1 else group_size // 2
