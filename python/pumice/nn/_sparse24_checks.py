"""What :class:`pumice.nn.Sparse24Linear` accepts: settings, shapes, and the values of places."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from pumice.nn._int4_checks import FloatType, Zeros

_NAME = "Sparse24Linear"


def check_columns(in_features: int) -> None:
    if in_features % 4 != 0:
        raise ValueError(
            f"{_NAME}: in_features must be a multiple of 4, whole groups of four, not {in_features}"
        )


def check_options(
    value_dtype: object, bits: object, group_size: object, zeros_kind: object, scale_dtype: object
) -> None:
    if bits not in (2, 3, 4, 8) or isinstance(bits, bool):
        raise ValueError(f"{_NAME}: bits must be 2, 3, 4 or 8, not {bits!r}")
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"{_NAME}: group_size must be an integer, not {group_size!r}")
    if group_size != -1 and (group_size < 32 or group_size % 32):
        raise ValueError(f"{_NAME}: group_size must be -1 or a multiple of 32, not {group_size}")
    for argument, value, accepted in (
        ("value_dtype", value_dtype, get_args(FloatType)),
        ("zeros_kind", zeros_kind, get_args(Zeros)),
        ("scale_dtype", scale_dtype, get_args(FloatType)),
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


def check_metadata(metadata: Tensor, k: int) -> None:
    """Sparse tensor cores take two places that ascend; anything else is undefined."""
    places = torch.stack([metadata >> 2 * i & 3 for i in range(4)], dim=-1).view(
        len(metadata), -1, 2
    )
    wrong = (places[..., 0] >= places[..., 1]).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        where = f"columns {4 * group} to {4 * group + 3}" if 4 * group < k else "beyond K"
        raise ValueError(
            f"{_NAME}: metadata, row {row}, group {group} ({where}) holds the places "
            f"{places[row, group].tolist()}; two that ascend are wanted"
        )


def check_zeros(zeros: Tensor, bits: int) -> None:
    """Integer zero points fit into the bits of the weight; they are values of q."""
    if zeros.dtype == torch.uint8 and bits < 8 and bool((zeros >= 2**bits).any()):
        raise ValueError(
            f"{_NAME}: zeros hold {int(zeros.max())}, but {2**bits - 1} is the largest of {bits} "
            "bits"
        )


def float_type_of(name: str, tensor: Tensor) -> FloatType:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in get_args(FloatType):
        raise TypeError(f"{_NAME}: {name} must be float32, float16 or bfloat16, not {dtype}")
    return dtype  # type: ignore[return-value]


def check_kept(mask: Tensor, *, exactly_two: bool) -> None:
    kept = mask.view(mask.shape[0], -1, 4).sum(-1)
    wrong = (kept != 2 if exactly_two else kept > 2).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        why = (
            "with floating zeros, for which no q means a weight of zero, exactly two are needed"
            if exactly_two
            else "at most two may be"
        )
        raise ValueError(
            f"{_NAME}: mask, row {row}, group {group} (columns {4 * group} to {4 * group + 3}) "
            f"keeps {int(kept[row, group])} weights; {why}"
        )


def filled_codes(
    q: Tensor, mask: Tensor, zeros: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """q where the mask is set, elsewhere what means a weight of zero."""
    if bits < 8 and bool((q[mask] >= 2**bits).any()):
        raise ValueError(
            f"{_NAME}: q holds values beyond {2**bits - 1}, the largest of {bits} bits"
        )
    if zeros is None:
        return torch.where(mask, q, 1 << (bits - 1))
    if zeros.is_floating_point():
        return q
    size = q.shape[1] if group_size == -1 else group_size
    spread = zeros.repeat_interleave(size, dim=1)[:, : q.shape[1]]
    return torch.where(mask, q, spread)
