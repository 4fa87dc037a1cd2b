"""One int8 layer of bitsandbytes, in our names: W = weight · SCB / 127."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# weight_format: row-major is 0; the others are GPU layouts of versions before 0.45.
_ROW_MAJOR = (0, "row")


def convert_layer(state_dict: dict[str, Any], prefix: str) -> None:
    """Rename and rescale one layer's entries in place; others than int8 ones are left alone."""
    scb = state_dict.get(prefix + "SCB")
    if scb is None:
        return
    weight = state_dict.get(prefix + "weight")
    if not isinstance(weight, Tensor) or weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(
            f"{prefix}SCB is present, so {prefix}weight must be an int8 matrix, but it is "
            f"{'missing' if weight is None else f'{weight.dtype} {list(weight.shape)}'}"
        )
    if scb.numel() != weight.shape[0]:
        raise ValueError(
            f"{prefix}SCB must hold one number for each of the {weight.shape[0]} rows of "
            f"{prefix}weight, not {scb.numel()}"
        )
    layout = state_dict.get(prefix + "weight_format", 0)
    layout = layout.item() if isinstance(layout, Tensor) else layout
    if layout not in _ROW_MAJOR:
        raise ValueError(
            f"{prefix}weight_format is {layout!r}: only row-major weights are read; save the "
            "checkpoint again with bitsandbytes >= 0.45"
        )
    for name in ("SCB", "weight", "weight_format"):
        state_dict.pop(prefix + name, None)
    state_dict[prefix + "qweight"] = weight
    state_dict[prefix + "weight_scale"] = scb.float().flatten() / 127
