"""AWQ checkpoints in the GEMM order (AutoAWQ): 4 bits, packed along the outputs.

A layer of K inputs and N outputs (a multiple of 8) in groups of g inputs, G = K / g::

    qweight  int32 [K, N/8]     nibble i (bits 4i … 4i+3) of word c is q[8c + ORDER[i], k]
    qzeros   int32 [G, N/8]     the zero points in the same order, stored as they are (no -1)
    scales   floating [G, N]
    W[n, k] = (q[n, k] - z[g, n]) · scales[g, n]                     g = k // g

    ORDER = 0 2 4 6 1 3 5 7     so that w & 0x000F000F is a pair of neighbours, (0, 1), and so on:
                                one mask and one OR make two float16 of it.

    bit   31   28   24   20   16   12    8    4    0
    column  | 7  | 5  | 3  | 1  | 6  | 4  | 2  | 0  |       of each 8
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pumice.integrations.formats._config import config_bits, config_group_size, the_same
from pumice.integrations.formats._layer import check_device, refuse_others, take, take_scales
from pumice.integrations.formats._packed import PackedWeight, groups, middle_or_zeros
from pumice.nn import CompressedLinear, Int4Linear
from pumice.ops import int4_pack, int4_unpack

QUANT_METHOD = "awq"
TENSORS = ("qweight", "qzeros", "scales")
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(ORDER.index(column) for column in range(8))


def read(
    tensors: Mapping[str, Tensor], *, k: int, group_size: int, layer: str = ""
) -> PackedWeight:
    """One layer's tensors, as listed above, in our packing.

    Raises:
        ValueError: a tensor missing, unknown, of a wrong shape or dtype, on another device than the
            rest; scales not finite. The tensor is named.
    """
    refuse_others(tensors, TENSORS, layer)
    check_device(tensors, layer)
    n = 8 * tensors["qweight"].shape[-1] if "qweight" in tensors else 0
    count = groups(k, group_size)
    why = f"{k} inputs, {n} outputs, groups of {group_size}"
    qweight = take(tensors, "qweight", layer, (torch.int32,), (k, n // 8), why)
    qzeros = take(tensors, "qzeros", layer, (torch.int32,), (count, n // 8), why)
    scales = take_scales(tensors, "scales", layer, (count, n), why)
    q = _reordered(int4_unpack(qweight.contiguous(), n, BITS), _INVERSE)
    zeros = _reordered(int4_unpack(qzeros.contiguous(), n, BITS), _INVERSE)
    return PackedWeight(
        int4_pack(q.T.contiguous(), BITS),
        scales.T.contiguous(),
        middle_or_zeros(zeros.T, BITS),
        None,
        k,
        BITS,
        group_size,
    )


def write(weight: PackedWeight) -> dict[str, Tensor]:
    """The inverse of :func:`read`.

    Raises:
        ValueError: other than 4 bits, outputs not a multiple of 8, groups that do not divide the
            inputs, activation order, fractional zero points: the format has no place for them.
    """
    if weight.bits != BITS:
        raise ValueError(f"it has {weight.bits} bits, and AWQ has 4")
    if weight.n % 8:
        raise ValueError(f"it has {weight.n} outputs, and AWQ needs a multiple of 8")
    if weight.group_size != -1 and weight.k % weight.group_size:
        raise ValueError(
            f"its groups of {weight.group_size} do not divide its {weight.k} inputs, as AWQ needs"
        )
    if weight.g_idx is not None:
        raise ValueError("it has activation order, for which AWQ has no place")
    q = _reordered(weight.unpack().T, ORDER)
    zeros = _reordered(weight.full_zeros().T, ORDER)
    return {
        "qweight": int4_pack(q.contiguous(), BITS),
        "qzeros": int4_pack(zeros.contiguous(), BITS),
        "scales": weight.scales.T.contiguous(),
    }


def _reordered(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """Column 8c + i becomes what column 8c + order[i] was."""
    return rows.reshape(rows.shape[0], -1, 8)[..., list(order)].flatten(1)


class Reader:
    """Layers of an AWQ checkpoint, as its ``quantization_config`` describes them."""

    markers: tuple[str, ...] = ("qweight",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        # AutoAWQ's own file has other names than config.json.
        bits_name = "w_bit" if "w_bit" in config else "bits"
        size_name = "q_group_size" if "q_group_size" in config else "group_size"
        if config_bits(config, bits_name) != BITS:
            raise ValueError(f"AWQ with {config[bits_name]} bits is not read, only with 4")
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise ValueError(f"AWQ's version {version!r} is not read, only 'gemm'")
        self._group_size = config_group_size(config, size_name)

    def make_layer(
        self, name: str, linear: nn.Linear, tensors: Mapping[str, Tensor]
    ) -> CompressedLinear:
        weight = read(tensors, k=linear.in_features, group_size=self._group_size, layer=name)
        return weight.to_layer(linear)


class Writer:
    """A model's layers as an AWQ checkpoint, which has one group size."""

    def write_layer(self, name: str, layer: CompressedLinear) -> dict[str, Tensor]:
        if not isinstance(layer, Int4Linear):
            raise ValueError(f"AWQ holds Int4Linear layers only, not a {type(layer).__name__}")
        return write(PackedWeight.from_layer(layer))

    def describe(self, layers: Mapping[str, CompressedLinear], left: list[str]) -> dict[str, Any]:
        """The ``quantization_config``; ``left`` are the linear layers that are not compressed."""
        return {
            "quant_method": QUANT_METHOD,
            "bits": BITS,
            "group_size": the_same(layers, "group_size", "AWQ"),
            "zero_point": True,  # the format always stores them
            "version": "gemm",
            "modules_to_not_convert": left or None,
        }
