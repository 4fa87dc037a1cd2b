"""Weights of a few bits in groups: packing, dequantization, and the linear layer on them.

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

from typing import Any

import torch
from torch import Tensor

from pumice.ops import _library
from pumice.ops._checks import (
    FLOATING,
    check_dtype,
    check_input,
    check_kernels,
    check_same_device,
    check_tensor,
    check_vector,
    shape_of,
)

BITS = (2, 3, 4, 8)
GROUP_MULTIPLE = 16


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
    _check_bits(op, bits)
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
    _check_qweight(op, qweight, k, bits)
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
        RuntimeError: a zero point or a group index out of range (checked on the CPU); no kernels
            for the device of qweight; or ``backward`` through the result.
    """
    op = "int4_dequantize"
    scales, zeros, g_idx = _check_weight(op, qweight, scales, zeros, g_idx, k, group_size, bits)
    if out_dtype not in FLOATING:
        raise TypeError(f"{op}: out_dtype must be float32, float16 or bfloat16, not {out_dtype}")
    weight: Tensor = _library.ops.int4_dequantize(
        qweight, scales, zeros, g_idx, k, group_size, bits, out_dtype=out_dtype
    )
    return weight


def int4_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    g_idx: Tensor | None = None,
    perm: Tensor | None = None,
    bias: Tensor | None = None,
    outlier_idx: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    *,
    group_size: int,
    bits: int = 4,
    int8_activation: bool = False,
) -> Tensor:
    """Linear layer with packed weights, dequantized inside the product.

    With W as in :func:`int4_dequantize`::

        y[m, n] = Σ_k x[m, perm[k]] · W[n, k]                            (perm: identity if None)
                + Σ_j x[m, outlier_idx[j]] · outlier_weight[n, j]        (OWQ's weak columns)
                + Σ_r (Σ_k x[m, k] · lora_a[r, k]) · lora_b[n, r]        (low-rank compensation)
                + bias[n]

    Sums are fp32 or finer, the result is rounded once to the dtype of x. NaN and ±Inf in x stay in
    their row. Whoever packs a weight with outlier columns stores q = zero there, so that W = 0.

    On the CPU the activations become fixed-point numbers, one power of two as the scale for each
    row and each 128 of them, and the products are integers: fp16 and bf16 in 15 bits, wrong by at
    most 2^-15 of the largest of the 128 (and exact down to 2^-3 or 2^-6 of it); fp32 in 28 bits. A
    row with a NaN or ±Inf may become NaN as a whole. (With ``g_idx`` or another width than 4 bits,
    and without AVX2, the products are fp32.)

    ``perm`` is activation order without its cost: columns are stored sorted by group, and x is read
    through ``perm``. ``g_idx`` is the general form, for any assignment of columns to groups, and
    slower.

    With ``int8_activation`` (CPU only) the activations, in the order ``perm`` gives, are quantized
    to int8, one scale for each row and each 128 of them: the trade of ggml and onnxruntime. The
    outlier and low-rank terms see x itself; outlier columns are left out of the quantization. The
    error of an activation is at most 1/254 of the largest magnitude among its 128.

    Differentiable in x, bias, outlier_weight, lora_a and lora_b (x with int8_activation: straight
    through); the weight is dequantized to the dtype of x for the time of the product.

    Args:
        x: fp32, fp16 or bf16 [..., K]; any strides; may be empty.
        qweight: int32 [N, ceil(K · bits / 32)], contiguous.
        scales: fp16, bf16 or fp32 [N, G], G = ceil(K / group_size); any G ≥ 1 with ``g_idx``.
        zeros: uint8 [N, G] below 2^bits, or [N, G] in the dtype of ``scales``; None: 2^(bits-1).
        g_idx: int32 [K], the group of each column, in [0, G).
        perm: int32 [K], a permutation of 0 … K-1.
        bias: fp32, fp16 or bf16 [N].
        outlier_idx: int32 [n_o], columns of x (before ``perm``); with ``outlier_weight``.
        outlier_weight: fp32, fp16 or bf16 [N, n_o].
        lora_a, lora_b: fp32, fp16 or bf16 [r, K] and [N, r].
        group_size: -1 or a positive multiple of 16.
        bits: 2, 3, 4 or 8.
        int8_activation: quantize the activations, see above.

    Returns:
        y of shape [..., N] and the dtype of x, contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: a zero point or an index out of range (checked on the CPU); no kernels for
            the device of x, or none for ``int8_activation`` there.

    Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", 2022 (group-wise weights, act-order); Lee,
    Jin, Kim, Kim, Park, "OWQ", 2023 (outlier columns); Yao, Wu, Li, Youn, He, "ZeroQuant-V2", 2023
    (low-rank compensation).
    """
    op = "int4_linear"
    check_input(op, "x", x, FLOATING)
    k = x.shape[-1]
    check_tensor(op, "qweight", qweight)
    check_same_device(op, "qweight", qweight, "x", x)
    scales, zeros, g_idx = _check_weight(op, qweight, scales, zeros, g_idx, k, group_size, bits)
    n = qweight.shape[0]
    if perm is not None:
        perm = check_vector(op, "perm", perm, (k,), (torch.int32,), "x", x)
    if bias is not None:
        bias = check_vector(op, "bias", bias, (n,), FLOATING, "x", x)
    if (outlier_idx is None) != (outlier_weight is None):
        raise ValueError(f"{op}: outlier_idx and outlier_weight belong together; pass both or none")
    if outlier_idx is not None:
        _check_matrix(op, "outlier_weight", outlier_weight, FLOATING, x)
        assert outlier_weight is not None
        count = outlier_weight.shape[1]
        outlier_idx = check_vector(op, "outlier_idx", outlier_idx, (count,), (torch.int32,), "x", x)
        outlier_weight = _shaped(op, "outlier_weight", outlier_weight, n, count)
    if (lora_a is None) != (lora_b is None):
        raise ValueError(f"{op}: lora_a and lora_b belong together; pass both or none")
    if lora_a is not None:
        _check_matrix(op, "lora_a", lora_a, FLOATING, x)
        _check_matrix(op, "lora_b", lora_b, FLOATING, x)
        assert lora_b is not None
        rank = lora_a.shape[0]
        lora_a = _shaped(op, "lora_a", lora_a, rank, k)
        lora_b = _shaped(op, "lora_b", lora_b, n, rank)
    if int8_activation and x.device.type not in ("cpu", "meta"):
        raise RuntimeError(
            f"{op}: int8_activation=True has kernels on the CPU only, and x is on {x.device}; "
            "pass int8_activation=False"
        )
    y: Tensor = _library.ops.int4_linear(
        x,
        qweight,
        scales,
        zeros,
        g_idx,
        perm,
        bias,
        outlier_idx,
        outlier_weight,
        lora_a,
        lora_b,
        group_size=group_size,
        bits=bits,
        int8_activation=int8_activation,
    )
    return y


def _words(k: int, bits: int) -> int:
    return (k * bits + 31) // 32


def _groups(k: int, group_size: int) -> int:
    return 1 if group_size == -1 else (k + group_size - 1) // group_size


def _check_bits(op: str, bits: Any) -> None:
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"{op}: bits must be 2, 3, 4 or 8, not {bits!r}")


def _check_group_size(op: str, group_size: Any) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"{op}: group_size must be an int, not {type(group_size).__name__}")
    if group_size != -1 and (group_size <= 0 or group_size % GROUP_MULTIPLE != 0):
        raise ValueError(
            f"{op}: group_size must be -1 (one group for each row) or a positive multiple of "
            f"{GROUP_MULTIPLE}, not {group_size}"
        )


def _check_matrix(
    op: str, name: str, matrix: Any, accepted: tuple[torch.dtype, ...], x: Tensor
) -> None:
    check_tensor(op, name, matrix)
    check_dtype(op, name, matrix, accepted)
    if matrix.dim() != 2:
        raise ValueError(f"{op}: {name} must be a matrix, not of shape {shape_of(matrix)}")
    check_same_device(op, name, matrix, "x", x)


def _shaped(op: str, name: str, matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix, contiguous, if its shape is right."""
    if matrix.shape != (rows, columns):
        raise ValueError(
            f"{op}: {name} must have shape [{rows}, {columns}], not {shape_of(matrix)}"
        )
    contiguous: Tensor = matrix.contiguous()
    return contiguous


def _check_qweight(op: str, qweight: Any, k: int, bits: Any) -> None:
    check_tensor(op, "qweight", qweight)
    check_dtype(op, "qweight", qweight, (torch.int32,))
    check_kernels(op, qweight)
    _check_bits(op, bits)
    if k < 1:
        raise ValueError(f"{op}: k must be at least 1, not {k}")
    if qweight.dim() != 2 or qweight.shape[0] < 1 or qweight.shape[1] != _words(k, bits):
        raise ValueError(
            f"{op}: qweight must have shape [N, {_words(k, bits)}] for K = {k} values of {bits} "
            f"bits, N >= 1, not {shape_of(qweight)}"
        )
    if not qweight.is_contiguous():
        raise ValueError(
            f"{op}: qweight must be contiguous (a copy for every call would cost more than the "
            "call); pass qweight.contiguous(), made once"
        )


def _check_weight(
    op: str,
    qweight: Any,
    scales: Any,
    zeros: Any,
    g_idx: Any,
    k: int,
    group_size: Any,
    bits: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A packed weight of K input features. Returns scales, zeros and g_idx, contiguous."""
    _check_qweight(op, qweight, k, bits)
    _check_group_size(op, group_size)
    check_tensor(op, "scales", scales)
    check_dtype(op, "scales", scales, FLOATING)
    check_same_device(op, "scales", scales, "qweight", qweight)
    n = qweight.shape[0]
    if g_idx is not None:
        g_idx = check_vector(op, "g_idx", g_idx, (k,), (torch.int32,), "qweight", qweight)
        if scales.dim() != 2 or scales.shape[0] != n or scales.shape[1] < 1:
            raise ValueError(
                f"{op}: scales must have shape [{n}, G], G >= 1, not {shape_of(scales)}"
            )
    elif scales.shape != (n, _groups(k, group_size)):
        raise ValueError(
            f"{op}: scales must have shape [{n}, {_groups(k, group_size)}] for K = {k} in groups "
            f"of {group_size}, not {shape_of(scales)}"
        )
    if zeros is not None:
        check_tensor(op, "zeros", zeros)
        check_dtype(op, "zeros", zeros, (torch.uint8, scales.dtype))
        check_same_device(op, "zeros", zeros, "qweight", qweight)
        if zeros.shape != scales.shape:
            raise ValueError(
                f"{op}: zeros must have the shape of scales {shape_of(scales)}, not "
                f"{shape_of(zeros)}"
            )
        zeros = zeros.contiguous()
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{op}: {name} requires a gradient, but quantized weights are frozen; detach it"
            )
    return scales.contiguous(), zeros, g_idx


def _pack_fake(q: Tensor, bits: int = 4) -> Tensor:
    return q.new_empty((q.shape[0], _words(q.shape[1], bits)), dtype=torch.int32)


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


def _linear_fake(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    g_idx: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    outlier_idx: Tensor | None,
    outlier_weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    *,
    group_size: int,
    bits: int = 4,
    int8_activation: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


# Positions of int4_linear's tensors.
_X, _BIAS, _OUTLIER_WEIGHT, _LORA_A, _LORA_B = 0, 6, 8, 9, 10


def _linear_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    x, qweight, scales, zeros, g_idx, perm, bias, outlier_idx, outlier_weight, a, b = inputs
    needed = ctx.needs_input_grad
    # The gradient of x is linear in dy alone; only the dense terms' own gradients look at x.
    needs_x = needed[_OUTLIER_WEIGHT] or needed[_LORA_A] or needed[_LORA_B]
    ctx.save_for_backward(
        x if needs_x else None, qweight, scales, zeros, g_idx, perm, outlier_idx, outlier_weight,
        a, b,
    )  # fmt: skip
    ctx.x_dtype = x.dtype
    ctx.x_shape = x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.group_size = keyword_only_inputs["group_size"]
    ctx.bits = keyword_only_inputs.get("bits", 4)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the wider of their dtypes."""
    wider = torch.promote_types(a.dtype, b.dtype)
    return a.to(wider).matmul(b.to(wider))


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, qweight, scales, zeros, g_idx, perm, outlier_idx, outlier_weight, a, b = ctx.saved_tensors
    k = ctx.x_shape[-1]
    rows = dy.reshape(-1, dy.shape[-1])
    gradients: list[Tensor | None] = [None] * 11
    if ctx.needs_input_grad[_X]:
        weight = _library.ops.int4_dequantize(
            qweight, scales, zeros, g_idx, k, ctx.group_size, ctx.bits, out_dtype=ctx.x_dtype
        )
        dx = rows.matmul(weight)
        if perm is not None:
            dx = torch.zeros_like(dx).index_copy(1, perm.long(), dx)
        if outlier_idx is not None:
            share = _product(rows, outlier_weight).to(dx.dtype)
            dx = dx.index_add(1, outlier_idx.long(), share)
        if a is not None:
            dx = dx + _product(_product(rows, b), a).to(dx.dtype)
        gradients[_X] = dx.reshape(ctx.x_shape)
    if ctx.needs_input_grad[_BIAS]:
        gradients[_BIAS] = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    if ctx.needs_input_grad[_OUTLIER_WEIGHT]:
        columns = x.reshape(-1, k).index_select(1, outlier_idx)
        gradients[_OUTLIER_WEIGHT] = _product(rows.T, columns).to(outlier_weight.dtype)
    if ctx.needs_input_grad[_LORA_A]:
        gradients[_LORA_A] = _product(_product(rows, b).T, x.reshape(-1, k)).to(a.dtype)
    if ctx.needs_input_grad[_LORA_B]:
        gradients[_LORA_B] = _product(rows.T, _product(x.reshape(-1, k), a.T)).to(b.dtype)
    return tuple(gradients)


_FROZEN = "Quantized weights are frozen; pumice.ops.int4_linear is differentiable in x."
for _name, _fake in (
    ("int4_pack", _pack_fake),
    ("int4_unpack", _unpack_fake),
    ("int4_dequantize", _dequantize_fake),
):
    _library.declare(_name, fake=_fake, backward=_library.not_differentiable(_name, _FROZEN))
_library.declare(
    "int4_linear", fake=_linear_fake, backward=_linear_backward, setup_context=_linear_setup
)
