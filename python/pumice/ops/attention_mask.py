"""Boolean attention masks as the kernels read them: a bit for each query and key.

The layout (``csrc/common/attention_mask.h``)::

    bits    int32 [B or 1, H or 1, S_q, ceil(S_k/32)]           bit j % 32 of word j // 32: key j
    blocks  uint8 [B or 1, H or 1, ceil(S_q/64), ceil(S_k/64)]  of each 64 × 64 square: 0 shows
                                                                nothing, 1 something, 2 all

Squares that show nothing are skipped, squares that show all need no test of their elements; the
bits are an eighth of the boolean mask's memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pumice.ops import _library
from pumice.ops._checks import check_dtype, check_kernels, check_tensor, shape_of


class PackedMask(NamedTuple):
    """What :func:`pack_attention_mask` makes of a mask; pack once, use in every layer."""

    bits: Tensor
    blocks: Tensor
    shape: tuple[int, int, int, int]  # [B or 1, H or 1, S_q, S_k] of the boolean mask

    def to(self, device: torch.device | str) -> PackedMask:
        """The same mask on another device."""
        return PackedMask(self.bits.to(device), self.blocks.to(device), self.shape)


def pack_attention_mask(mask: Tensor) -> PackedMask:
    """Pack a boolean mask for :func:`pumice.ops.flash_attention`: any mask, trees included.

    Args:
        mask: bool [B or 1, H or 1, S_q, S_k], or without leading dimensions, True where query i
            sees key j; any strides, so that an expanded tensor costs nothing.

    Returns:
        The packed mask.

    Raises:
        TypeError, ValueError: a mask of another type, dtype or rank.
        RuntimeError: no kernels for the device of the mask.
    """
    op = "pack_attention_mask"
    check_tensor(op, "mask", mask)
    check_dtype(op, "mask", mask, (torch.bool,))
    if not 2 <= mask.dim() <= 4:
        raise ValueError(
            f"{op}: mask must have shape [S_q, S_k], [H or 1, S_q, S_k] or "
            f"[B or 1, H or 1, S_q, S_k], not {shape_of(mask)}"
        )
    check_kernels(op, mask)
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    bits, blocks = _library.ops.attention_mask_pack(mask)
    batch, heads, queries, keys = mask.shape
    return PackedMask(bits, blocks, (batch, heads, queries, keys))


def packed_for(
    op: str, mask: Any, batch: int, heads: int, queries: int, keys: int, query: Tensor
) -> PackedMask:
    """The mask of a call, packed if it is not, after checking that it fits."""
    if not isinstance(mask, (Tensor, PackedMask)):
        raise TypeError(
            f"{op}: mask must be a torch.Tensor or a PackedMask, not {type(mask).__name__}"
        )
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise TypeError(
            f"{op}: mask must be bool (True where a query sees a key), not "
            f"{str(mask.dtype)[6:]}; an additive mask of 0 and -inf is `mask == 0`"
        )
    device = mask.device if isinstance(mask, Tensor) else mask.bits.device
    if device != query.device:
        raise ValueError(
            f"{op}: mask is on {device}, but query is on {query.device}; all tensors must be on "
            "one device"
        )
    shape = tuple(mask.shape)
    leading = (1, 1, 1, 1)[len(shape) :] + shape
    wanted = (batch, heads, queries, keys)
    fits = 2 <= len(shape) <= 4 and all(
        is_size == size or is_size == 1 for is_size, size in zip(leading, wanted, strict=True)
    )
    if isinstance(mask, PackedMask):
        fits = fits and leading[2] == queries and leading[3] == keys
    if not fits:
        raise ValueError(
            f"{op}: mask must be broadcastable to [B, H, S_q, S_k] = [{batch}, {heads}, {queries}, "
            f"{keys}]{'' if isinstance(mask, Tensor) else ' (a packed one in its first two)'}, not "
            f"[{', '.join(map(str, shape))}]"
        )
    if isinstance(mask, PackedMask):
        return mask
    return pack_attention_mask(mask.reshape(leading).expand(leading[0], leading[1], queries, keys))
