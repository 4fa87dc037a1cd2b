"""compressed-tensors (llm-compressor, vLLM): the tensors of ``pack-`` and ``int-quantized`` layers.

``pack-quantized``, weights of 2, 3, 4 or 8 bits, N outputs, K inputs, G groups::

    weight_packed      int32 [N, ceil(K·b/32)]   signed value + 2^(b-1), value k at bit k·b of the
                                                 row: our qweight, bit for bit
    weight_scale       floating [N, G]; [N, 1] for strategy "channel", [1] for "tensor"
    weight_zero_point  int32 [ceil(N·b/32), G]   signed zero point + 2^(b-1), packed along N;
                                                 older files: int8 [N, G], signed, unpacked
    weight_shape       int64 [2]                 N, K
    weight_g_idx       int32 [K]                 the group of each input (actorder "group" of
                                                 versions before August 2026; all -1: unused)
    W[n, k] = (q[n, k] - z[n, g]) · weight_scale[n, g]

``int-quantized``::

    weight             int8 [N, K]
    weight_scale       floating [N, 1], or [1] for strategy "tensor"
    input_scale        [1], for a static scale of the activations
    W[n, k] = weight[n, k] · weight_scale[n]

Which layer has what is said by the schemes, see :mod:`pumice.integrations.formats.schemes`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pumice.integrations.formats._layer import (
    FLOATING,
    INTEGERS,
    check_device,
    refuse_others,
    take,
    take_scales,
)
from pumice.integrations.formats._packed import PackedWeight, groups, middle_or_zeros, words
from pumice.integrations.formats.gptq import checked_g_idx
from pumice.nn import Int8Linear
from pumice.ops import int4_pack, int4_unpack

PACKED_TENSORS = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
)
INT8_TENSORS = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")


def read_packed(
    tensors: Mapping[str, Tensor],
    *,
    n: int,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    layer: str = "",
) -> PackedWeight:
    """One ``pack-quantized`` layer in our packing.

    Args:
        tensors: by name, as listed above.
        n, k: outputs and inputs.
        bits, group_size, symmetric: as the scheme says; group_size -1 for "channel" and "tensor".
        layer: a name for messages.

    Raises:
        ValueError: a tensor missing, unknown, of a wrong shape or dtype, on another device than the
            rest; scales not finite; a zero point or a group out of range. The tensor is named.
    """
    refuse_others(tensors, PACKED_TENSORS, layer)
    check_device(tensors, layer)
    count = groups(k, group_size)
    why = f"{bits} bits, [{n}, {k}], groups of {group_size}"
    packed = take(tensors, "weight_packed", layer, (torch.int32,), (n, words(k, bits)), why)
    if "weight_shape" in tensors:
        shape = take(tensors, "weight_shape", layer, INTEGERS, (2,), "outputs, inputs")
        if shape.tolist() != [n, k]:
            raise ValueError(
                f"'{layer}.weight_shape' is {shape.tolist()}, but the layer is {[n, k]}"
            )
    g_idx = None
    if "weight_g_idx" in tensors:
        g_idx = take(tensors, "weight_g_idx", layer, INTEGERS, (k,), f"{k} inputs")
        unused = bool((g_idx == -1).all())
        name = f"{layer}.weight_g_idx"
        g_idx = None if unused else checked_g_idx(g_idx, k, count, group_size, name)
    return PackedWeight(
        packed.contiguous(),
        _scales(tensors, n, count, layer, why).contiguous(),
        None if symmetric else _zeros(tensors, n, count, bits, layer, why),
        g_idx,
        k,
        bits,
        group_size,
    )


def write_packed(weight: PackedWeight) -> dict[str, Tensor]:
    """The inverse of :func:`read_packed`.

    Raises:
        ValueError: fractional zero points; groups that do not divide the inputs.
    """
    if weight.group_size != -1 and weight.k % weight.group_size:
        raise ValueError(
            f"its groups of {weight.group_size} do not divide its {weight.k} inputs, as "
            "compressed-tensors needs"
        )
    tensors = {
        "weight_packed": weight.qweight,
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor([weight.n, weight.k], dtype=torch.int64),
    }
    if weight.zeros is not None:
        zeros = weight.full_zeros()
        packed = int4_pack(zeros.T.contiguous(), weight.bits)
        tensors["weight_zero_point"] = packed.T.contiguous()
    if weight.g_idx is not None:
        tensors["weight_g_idx"] = weight.g_idx
    return tensors


def read_int8(
    tensors: Mapping[str, Tensor], linear: nn.Linear, *, dynamic: bool, per_token: bool, layer: str
) -> Int8Linear:
    """One ``int-quantized`` layer with int8 activations, in the place of ``linear``.

    Their activations are divided by 127.5 of a dynamic scale and reach -128, ours by 127: the
    products agree to the rounding of the activations, the weights exactly.

    Raises:
        ValueError: as for :func:`read_packed`; a zero point other than 0, a scale not positive.
    """
    refuse_others(tensors, INT8_TENSORS, layer)
    check_device(tensors, layer)
    n, k = linear.out_features, linear.in_features
    weight = take(tensors, "weight", layer, (torch.int8,), (n, k), f"[{n}, {k}]")
    scales = _scales(tensors, n, 1, layer, f"{n} outputs", keep_single=True)
    for name in ("weight_zero_point", "input_zero_point"):
        if name in tensors and bool(tensors[name].any()):
            raise ValueError(f"'{layer}.{name}' is not zero: int8 layers here are symmetric")
    single = tensors["weight_scale"].dim() < 2
    new = Int8Linear(
        k,
        n,
        linear.bias is not None,
        activations="per_token" if per_token else "per_tensor",
        weights="per_tensor" if single else "per_channel",
        static_activations=not dynamic,
        device="meta",
        dtype=linear.weight.dtype if linear.bias is None else linear.bias.dtype,
    )
    new.qweight, new.weight_scale = weight.contiguous(), scales.float().flatten()
    if not dynamic:
        scale = tensors.get("input_scale")
        if scale is None or scale.numel() != 1 or scale.dtype not in FLOATING:
            raise ValueError(
                f"'{layer}.input_scale' must hold one floating number: the scheme has static "
                "activation scales"
            )
        if not bool(scale.isfinite() & (scale > 0)):
            raise ValueError(f"'{layer}.input_scale' must be positive and finite, not {scale}")
        new.activation_scale = scale.float().reshape(1)
    new.bias = linear.bias
    return new.train(linear.training)


def write_int8(layer: Int8Linear) -> dict[str, Tensor]:
    """The inverse of :func:`read_int8`; ValueError for a smoothed layer."""
    if layer.smooth is not None:
        raise ValueError(
            "it multiplies its activations by a smoothing vector, for which compressed-tensors has "
            "no place"
        )
    scale = layer.weight_scale
    tensors = {
        "weight": layer.qweight,
        "weight_scale": scale if layer.weights == "per_tensor" else scale.unsqueeze(1),
    }
    if layer.activation_scale is not None:
        tensors["input_scale"] = layer.activation_scale
    return tensors


def int8_as_packed(
    tensors: Mapping[str, Tensor], *, n: int, k: int, group_size: int, layer: str
) -> PackedWeight:
    """One ``int-quantized`` layer without quantized activations, in our packing of 8 bits."""
    refuse_others(tensors, INT8_TENSORS, layer)
    check_device(tensors, layer)
    count = groups(k, group_size)
    why = f"[{n}, {k}], groups of {group_size}"
    weight = take(tensors, "weight", layer, (torch.int8,), (n, k), why)
    zeros = None
    if "weight_zero_point" in tensors:
        zeros = _zeros(tensors, n, count, 8, layer, why)
    q = (weight.to(torch.int16) + 128).to(torch.uint8)
    scales = _scales(tensors, n, count, layer, why).contiguous()
    return PackedWeight(int4_pack(q, 8), scales, zeros, None, k, 8, group_size)


def _scales(
    tensors: Mapping[str, Tensor],
    n: int,
    count: int,
    layer: str,
    why: str,
    *,
    keep_single: bool = False,
) -> Tensor:
    """[N, G]; one scale for the whole tensor is repeated, unless ``keep_single``."""
    given = tensors.get("weight_scale")
    if given is not None and given.numel() == 1 and given.dim() < 2:
        scale = take_scales(tensors, "weight_scale", layer, tuple(given.shape), why).reshape(1, 1)
        return scale if keep_single else scale.repeat(n, count)
    return take_scales(tensors, "weight_scale", layer, (n, count), why)


def _zeros(
    tensors: Mapping[str, Tensor], n: int, count: int, bits: int, layer: str, why: str
) -> Tensor | None:
    """Zero points as unsigned numbers, uint8 [N, G], packed or not; None if all are the middle."""
    middle = 1 << (bits - 1)
    given = tensors.get("weight_zero_point")
    if given is not None and given.dtype == torch.int8:
        signed = take(tensors, "weight_zero_point", layer, (torch.int8,), (n, count), why)
        shifted = signed.to(torch.int16) + middle
        if bool(((shifted < 0) | (shifted >= 2 * middle)).any()):
            raise ValueError(
                f"'{layer}.weight_zero_point' holds values beyond {bits} bits, "
                f"[{-middle}, {middle - 1}]"
            )
        return middle_or_zeros(shifted.to(torch.uint8), bits)
    shape = (words(n, bits), count)
    packed = take(tensors, "weight_zero_point", layer, (torch.int32,), shape, why)
    return middle_or_zeros(int4_unpack(packed.T.contiguous(), n, bits).T, bits)
