"""What :class:`pumice.nn.Int4Linear` accepts: settings, shapes, and the values of its indices."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Zeros = Literal["none", "integer", "float"]
FloatType = Literal["float32", "float16", "bfloat16"]
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
_NAME = "Int4Linear"


def check_options(
    bits: object,
    group_size: object,
    zeros_kind: object,
    scale_dtype: object,
    outliers: object,
    rank: object,
    dense_dtype: object,
) -> None:
    if bits not in (2, 3, 4, 8) or isinstance(bits, bool):
        raise ValueError(f"{_NAME}: bits must be 2, 3, 4 or 8, not {bits!r}")
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"{_NAME}: group_size must be an integer, not {group_size!r}")
    if group_size != -1 and (group_size < 16 or group_size % 16):
        raise ValueError(f"{_NAME}: group_size must be -1 or a multiple of 16, not {group_size}")
    for argument, count in (("outliers", outliers), ("rank", rank)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"{_NAME}: {argument} must be an integer from 0 on, not {count!r}")
    for argument, value, accepted in (
        ("zeros_kind", zeros_kind, get_args(Zeros)),
        ("scale_dtype", scale_dtype, get_args(FloatType)),
        ("dense_dtype", dense_dtype, get_args(FloatType)),
    ):
        if value not in accepted:
            raise ValueError(f"{_NAME}: {argument} must be one of {accepted}, not {value!r}")


def check_tensor(
    name: str, value: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if value.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{_NAME}: {name} must be {accepted}, not {str(value.dtype)[6:]}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{_NAME}: {name} must have shape {list(shape)}, not {list(value.shape)}")


def check_zeros(zeros: Tensor, bits: int) -> None:
    """Integer zero points fit into the bits of the weight; they are values of q."""
    if zeros.dtype == torch.uint8 and bool((zeros >= 2**bits).any() if bits < 8 else False):
        raise ValueError(
            f"{_NAME}: zeros hold {int(zeros.max())}, but {2**bits - 1} is the largest of {bits} "
            "bits"
        )


def check_permutation(perm: Tensor, k: int) -> None:
    if not torch.equal(perm.long().sort().values, torch.arange(k, device=perm.device)):
        raise ValueError(f"{_NAME}: perm is not a permutation of 0 … {k - 1}")


def check_outlier_idx(outlier_idx: Tensor, k: int) -> None:
    """Each names a column of the input, and none twice, for it would be added twice."""
    if outlier_idx.numel() == 0:
        return
    low, high = int(outlier_idx.min()), int(outlier_idx.max())
    if low < 0 or high >= k:
        raise ValueError(
            f"{_NAME}: outlier_idx must lie in [0, {k}), but holds {low if low < 0 else high}"
        )
    if outlier_idx.unique().numel() != outlier_idx.numel():
        raise ValueError(f"{_NAME}: outlier_idx names a column twice")


def zeros_kind_of(zeros: Tensor | None) -> Zeros:
    if zeros is None:
        return "none"
    return "integer" if zeros.dtype == torch.uint8 else "float"


def float_type_of(name: str, tensor: Tensor) -> FloatType:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in get_args(FloatType):
        raise TypeError(f"{_NAME}: {name} must be float32, float16 or bfloat16, not {dtype}")
    return dtype  # type: ignore[return-value]


def order_of(g_idx: Tensor, k: int, group_size: int) -> Tensor | None:
    """The columns sorted by group, or None where they are already."""
    if g_idx.dtype not in INTEGERS or g_idx.shape != (k,):
        raise ValueError(
            f"{_NAME}: g_idx must be int32 or int64 [{k}], not {g_idx.dtype} {list(g_idx.shape)}"
        )
    size = k if group_size == -1 else group_size
    stored = torch.arange(k, device=g_idx.device) // size
    groups, order = g_idx.long().sort(stable=True)
    if not torch.equal(groups, stored):
        raise ValueError(
            f"{_NAME}: g_idx must give every group {size} columns, save the last; sorted groups of "
            "other sizes cannot be stored"
        )
    return None if torch.equal(g_idx.long(), stored) else order.to(torch.int32)
