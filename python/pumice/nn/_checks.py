"""What every layer of integers accepts: settings, shapes, dtypes. ``layer`` is its name."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Zeros = Literal["none", "integer", "float"]
FloatType = Literal["float32", "float16", "bfloat16"]


def check_grid(layer: str, bits: object, group_size: object, multiple: int) -> None:
    """Bits of a weight, and how many columns share a scale."""
    if bits not in (2, 3, 4, 8) or isinstance(bits, bool):
        raise ValueError(f"{layer}: bits must be 2, 3, 4 or 8, not {bits!r}")
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"{layer}: group_size must be an integer, not {group_size!r}")
    if group_size != -1 and (group_size < multiple or group_size % multiple):
        raise ValueError(
            f"{layer}: group_size must be -1 or a multiple of {multiple}, not {group_size}"
        )


def check_kinds(layer: str, zeros_kind: object, **float_types: object) -> None:
    """How zero points are stored, and the names of floating types."""
    for argument, value, accepted in (
        ("zeros_kind", zeros_kind, get_args(Zeros)),
        *((name, value, get_args(FloatType)) for name, value in float_types.items()),
    ):
        if value not in accepted:
            raise ValueError(f"{layer}: {argument} must be one of {accepted}, not {value!r}")


def check_tensor(
    layer: str, name: str, value: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if value.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{layer}: {name} must be {accepted}, not {str(value.dtype)[6:]}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{layer}: {name} must have shape {list(shape)}, not {list(value.shape)}")


def check_zeros(layer: str, zeros: Tensor, bits: int) -> None:
    """Integer zero points fit into the bits of the weight; they are values of q."""
    if zeros.dtype == torch.uint8 and bits < 8 and bool((zeros >= 2**bits).any()):
        raise ValueError(
            f"{layer}: zeros hold {int(zeros.max())}, but {2**bits - 1} is the largest of {bits} "
            "bits"
        )


def zeros_kind_of(zeros: Tensor | None) -> Zeros:
    if zeros is None:
        return "none"
    return "integer" if zeros.dtype == torch.uint8 else "float"


def float_type_of(layer: str, name: str, tensor: Tensor) -> FloatType:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in get_args(FloatType):
        raise TypeError(f"{layer}: {name} must be float32, float16 or bfloat16, not {dtype}")
    return dtype  # type: ignore[return-value]
