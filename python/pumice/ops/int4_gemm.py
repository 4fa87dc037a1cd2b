"""The linear layer on packed weights of a few bits, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.ops import _library
from pumice.ops._checks import FLOATING, check_input, check_same_device, check_tensor, check_vector
from pumice.ops._int4_checks import check_matrix, check_weight, shaped


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

    On CUDA 16-bit x of many rows (from 512 on, ``kInt4DequantizeFrom`` in
    ``csrc/cuda/gemm/int4_tiles.h``) is multiplied by torch's own product with the weight
    dequantized for the call, in the dtype of x, as are x @ lora_a^T, outlier_weight, lora_b and
    bias; that takes 2·N·K bytes of memory, at most 512 MiB at a time.

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
        RuntimeError: a zero point or an index out of range, on the CPU (on CUDA the values are not
            looked at, which would mean waiting for the device: an index out of range reads foreign
            memory. :class:`pumice.nn.Int4Linear` checks them once, when it is made or loaded); no
            kernels for the device of x, or none for ``int8_activation`` there.

    Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", 2022 (group-wise weights, act-order); Lee,
    Jin, Kim, Kim, Park, "OWQ", 2023 (outlier columns); Yao, Wu, Li, Youn, He, "ZeroQuant-V2", 2023
    (low-rank compensation).
    """
    op = "int4_linear"
    check_input(op, "x", x, FLOATING)
    k = x.shape[-1]
    check_tensor(op, "qweight", qweight)
    check_same_device(op, "qweight", qweight, "x", x)
    scales, zeros, g_idx = check_weight(op, qweight, scales, zeros, g_idx, k, group_size, bits)
    n = qweight.shape[0]
    if perm is not None:
        perm = check_vector(op, "perm", perm, (k,), (torch.int32,), "x", x)
    if bias is not None:
        bias = check_vector(op, "bias", bias, (n,), FLOATING, "x", x)
    if (outlier_idx is None) != (outlier_weight is None):
        raise ValueError(f"{op}: outlier_idx and outlier_weight belong together; pass both or none")
    if outlier_idx is not None:
        check_matrix(op, "outlier_weight", outlier_weight, FLOATING, x)
        assert outlier_weight is not None
        count = outlier_weight.shape[1]
        outlier_idx = check_vector(op, "outlier_idx", outlier_idx, (count,), (torch.int32,), "x", x)
        outlier_weight = shaped(op, "outlier_weight", outlier_weight, n, count)
    if (lora_a is None) != (lora_b is None):
        raise ValueError(f"{op}: lora_a and lora_b belong together; pass both or none")
    if lora_a is not None:
        check_matrix(op, "lora_a", lora_a, FLOATING, x)
        check_matrix(op, "lora_b", lora_b, FLOATING, x)
        assert lora_b is not None
        rank = lora_a.shape[0]
        lora_a = shaped(op, "lora_a", lora_a, rank, k)
        lora_b = shaped(op, "lora_b", lora_b, n, rank)
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


_library.declare(
    "int4_linear", fake=_linear_fake, backward=_linear_backward, setup_context=_linear_setup
)
