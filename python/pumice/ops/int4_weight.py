"""Weights of a few bits in groups: packing and dequantization.

The layout is one for all devices and for the state dict (``csrc/common/intn_layout.h``)::

    qweight  int32 [N, ceil(K·b/32)]   row n: a little-endian bit stream of q[n, k] ∈ [0, 2^b),
                                       value k at bit k·b; unused bits of the last word are 0
    scales   fp16, bf16 or fp32 [N, G]                   G = ceil(K / group_size)
    zeros    uint8 [N, G] (integers below 2^b), or of the dtype of scales [N, G] (any values),
             or None: 2^(b-1) everywhere (symmetric)
    W[n, k] = (q[n, k] - zeros[n, g]) · scales[n, g]     g = k // group_size, or g_idx[k]

It equals compressed-tensors' ``weight_packed``. ``group_size`` is -1 (one group for each row) or
any positive multiple of 16, whether it divides K or not: the last group may be short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.ops import _library
from pumice.ops._checks import FLOATING, check_dtype, check_kernels, check_tensor, shape_of
from pumice.ops._int4_checks import check_bits, check_qweight, check_weight, words


def int4_pack(q: Tensor, bits: int = 4) -> Tensor:
    """Pack values of ``bits`` bits: int32 [N, ceil(K · bits / 32)], value k at bit k · bits.

    Args:
        q: uint8 [N, K], N, K ≥ 1, every value below 2^bits.
        bits: 2, 3, 4 or 8.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: a value of q is 2^bits or more; no kernels for the device of q; or
            ``backward`` through the result, for the operator is not differentiable.
    """
    op = "int4_pack"
    check_tensor(op, "q", q)
    check_dtype(op, "q", q, (torch.uint8,))
    if q.dim() != 2 or 0 in q.shape:
        raise ValueError(f"{op}: q must have shape [N, K] with N, K >= 1, not {shape_of(q)}")
    check_kernels(op, q)
    check_bits(op, bits)
    packed: Tensor = _library.ops.int4_pack(q, bits)
    return packed


def int4_unpack(qweight: Tensor, k: int, bits: int = 4) -> Tensor:
    """The inverse of :func:`int4_pack`: uint8 [N, k].

    Args:
        qweight: int32 [N, ceil(k · bits / 32)].
        k: values in a row; the packed shape does not tell it.
        bits: 2, 3, 4 or 8.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype or shape.
        RuntimeError: no kernels for the device of qweight; or ``backward`` through the result.
    """
    op = "int4_unpack"
    check_qweight(op, qweight, k, bits)
    q: Tensor = _library.ops.int4_unpack(qweight, k, bits)
    return q


def int4_dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    g_idx: Tensor | None = None,
    *,
    k: int,
    group_size: int,
    bits: int = 4,
    out_dtype: torch.dtype,
) -> Tensor:
    """The weight itself: W[n, k] = (q[n, k] - zeros[n, g]) · scales[n, g].

    Computed in fp32 (for integer zeros with one rounding), rounded to ``out_dtype``: the bits are
    the same on every device.

    Args:
        qweight: int32 [N, ceil(k · bits / 32)].
        scales: fp16, bf16 or fp32 [N, G], G = ceil(k / group_size); any G ≥ 1 with ``g_idx``.
        zeros: uint8 [N, G] below 2^bits, or [N, G] in the dtype of ``scales``; None: 2^(bits-1).
        g_idx: int32 [k], the group of each column, in [0, G); None: k // group_size.
        k: input features.
        group_size: -1 or a positive multiple of 16.
        bits: 2, 3, 4 or 8.
        out_dtype: torch.float32, torch.float16 or torch.bfloat16.

    Returns:
        W of shape [N, k], contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: a zero point or a group index out of range, on the CPU (on CUDA the values are
            not looked at: a group out of range reads foreign memory); no kernels for the device of
            qweight; or ``backward`` through the result.
    """
    op = "int4_dequantize"
    scales, zeros, g_idx = check_weight(op, qweight, scales, zeros, g_idx, k, group_size, bits)
    if out_dtype not in FLOATING:
        raise TypeError(f"{op}: out_dtype must be float32, float16 or bfloat16, not {out_dtype}")
    weight: Tensor = _library.ops.int4_dequantize(
        qweight, scales, zeros, g_idx, k, group_size, bits, out_dtype=out_dtype
    )
    return weight


def _pack_fake(q: Tensor, bits: int = 4) -> Tensor:
    return q.new_empty((q.shape[0], words(q.shape[1], bits)), dtype=torch.int32)


def _unpack_fake(qweight: Tensor, k: int, bits: int = 4) -> Tensor:
    return qweight.new_empty((qweight.shape[0], k), dtype=torch.uint8)


def _dequantize_fake(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    g_idx: Tensor | None,
    k: int,
    group_size: int,
    bits: int = 4,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    return qweight.new_empty((qweight.shape[0], k), dtype=out_dtype)


_FROZEN = "Quantized weights are frozen; pumice.ops.int4_linear is differentiable in x."
for _name, _fake in (
    ("int4_pack", _pack_fake),
    ("int4_unpack", _unpack_fake),
    ("int4_dequantize", _dequantize_fake),
):
    _library.declare(_name, fake=_fake, backward=_library.not_differentiable(_name, _FROZEN))
