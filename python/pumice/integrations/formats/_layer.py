"""The stored tensors of one layer, checked while they are taken out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


def check_device(tensors: Mapping[str, Tensor], layer: str) -> None:
    """ValueError unless all tensors of a layer are on one device, and have data."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"the tensors of {layer!r} are on different devices: "
            + ", ".join(f"{name} on {device}" for name, device in sorted(devices.items()))
        )
    if any(device.type == "meta" for device in devices.values()):
        raise ValueError(f"the tensors of {layer!r} are on 'meta': they have no data")


def take(
    tensors: Mapping[str, Tensor],
    name: str,
    layer: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    why: str,
) -> Tensor:
    """One tensor of a layer; ValueError, naming it, unless it has one of the dtypes and the shape.

    ``why`` says where the shape comes from, e.g. "4 bits, 64 inputs".
    """
    tensor = tensors.get(name)
    full = f"{layer}.{name}" if layer else name
    if tensor is None:
        raise ValueError(f"{full!r} is missing; of this layer there is {sorted(tensors)}")
    if tensor.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{full!r} must be {accepted}, not {got}")
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{full!r} must have shape {list(shape)} ({why}), not {list(tensor.shape)}"
        )
    return tensor


def take_scales(
    tensors: Mapping[str, Tensor], name: str, layer: str, shape: tuple[int, ...], why: str
) -> Tensor:
    """Scales: floating, and finite."""
    scales = take(tensors, name, layer, FLOATING, shape, why)
    if not bool(scales.isfinite().all()):
        raise ValueError(f"'{layer}.{name}' holds NaN or infinite values")
    return scales


def refuse_others(tensors: Mapping[str, Tensor], known: tuple[str, ...], layer: str) -> None:
    """ValueError for a tensor of the layer that the format does not have."""
    for name in sorted(tensors):
        if name not in known:
            raise ValueError(
                f"'{layer}.{name}' is not part of the format, whose tensors are {', '.join(known)}"
            )
