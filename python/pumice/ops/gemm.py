"""Linear layers with int8 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.ops import _library
from pumice.ops._checks import (
    FLOATING,
    check_dtype,
    check_input,
    check_int8_weight,
    check_same_device,
    check_tensor,
    check_threshold,
    shape_of,
)


def int8_linear(
    q: Tensor,
    scale: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """Product of int8 activations and int8 weights (W8A8), dequantized in the same kernel.

    ::

        y[m, n] = (Σ_k q[m, k] · qweight[n, k]) · scale[m] · weight_scale[n] + bias[n]

    The sum is exact in int32 for all int8 values, -128 included; the rest is fp32, rounded once to
    ``out_dtype``. A row with scale NaN (see :func:`int8_quantize`) gives NaN, other rows unharmed.

    Args:
        q: int8 [..., K]; may be empty.
        scale: fp32, one for each row of q, or one for all (1 element).
        qweight: int8 [N, K], N ≥ 1, 1 ≤ K ≤ 131071.
        weight_scale: fp32 [N] (per channel) or [1] (per tensor).
        bias: fp32, fp16 or bf16 [N], whatever ``out_dtype`` is.
        out_dtype: torch.float32, torch.float16 or torch.bfloat16.

    Returns:
        y of shape [..., N] and dtype ``out_dtype``, contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: no kernels for the device of q; or ``backward`` through the result, for the
            operator is not differentiable.

    Source: the W8A8 product of SmoothQuant (Xiao et al., 2022) and ZeroQuant (Yao et al., 2022).
    """
    op = "int8_linear"
    check_input(op, "q", q, (torch.int8,))
    if out_dtype not in FLOATING:
        raise TypeError(f"{op}: out_dtype must be float32, float16 or bfloat16, not {out_dtype}")
    check_tensor(op, "scale", scale)
    check_dtype(op, "scale", scale, (torch.float32,))
    check_same_device(op, "scale", scale, "q", q)
    # The first test is the usual case, and puts no condition on a symbolic number of rows.
    if scale.shape != q.shape[:-1] and scale.numel() not in (1, q.numel() // q.shape[-1]):
        raise ValueError(
            f"{op}: scale must hold one element or one for each row of q {shape_of(q)}, but has "
            f"shape {shape_of(scale)}"
        )
    weight_scale, bias = check_int8_weight(op, qweight, weight_scale, bias, "q", q)
    y: Tensor = _library.ops.int8_linear(
        q, scale.flatten(), qweight, weight_scale, bias, out_dtype=out_dtype
    )
    return y


def int8_mixed_linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float = 6.0,
    per_element: bool = False,
) -> Tensor:
    """LLM.int8(): an int8 product with the outlier columns of the activations in 16 bit.

    With q, s = :func:`int8_quantize` (x, threshold=threshold), row by row, O = the columns of x
    that hold an outlier (|x| ≥ threshold) in any row, and r = x - s · q, what int8 left over::

        y[m, n] = (s[m] · Σ_k q[m, k] · qweight[n, k] + Σ_{k ∈ O} r[m, k] · qweight[n, k])
                  · weight_scale[n] + bias[n]

    r is kept in 16 bit (fp16 for fp16 x, bf16 for bf16 x; for fp32 x it stays fp32, to within two
    bf16), so columns in O are multiplied in 16 bit *as a whole* with the dequantized weight column:
    the paper's decomposition, written as a residual, so that x is read once and no second copy of
    any weight is kept.

    **Does a row depend on its neighbours?** By default yes, as in the paper and bitsandbytes: O is
    a union over the batch, so an outlier in one row makes its column more exact for every row. With
    ``per_element=True`` only the outlying elements themselves go through r, and no row depends on
    another: to the bit on the CPU; on CUDA up to the rounding of an fp32 sum whose terms are
    grouped by the columns in O. The error is larger in rows that profit from a neighbour's outlier.

    A NaN or ±Inf in x is an outlier: its row becomes what a float product with the dequantized
    weights gives; other rows are unharmed.

    For few rows the kernel may multiply x in 16 bit (fp32 x: as two bf16) with the int8 weights
    instead, y = (Σ_k x · qweight) · weight_scale + bias: such a product is bound by reading the
    weights, so it costs nothing, and its error is smaller. CUDA does so for M ≤ 32.

    Differentiable in x and bias, straight through the quantization of x::

        dx = dy @ (weight_scale · qweight)          dbias = Σ_m dy

    where the weight is dequantized to the dtype of x for the time of the product. The
    weights themselves get no gradient.

    Args:
        x: fp32, fp16 or bf16 [..., K]; any strides; may be empty.
        qweight: int8 [N, K], N ≥ 1, 1 ≤ K ≤ 131071.
        weight_scale: fp32 [N] (per channel) or [1]; must not require a gradient.
        bias: fp32, fp16 or bf16 [N].
        threshold: positive, in the units of x; the paper's 6.0. ``math.inf``: no decomposition.
        per_element: keep only outlying elements, not their columns, in 16 bit.

    Returns:
        y of shape [..., N] and the dtype of x, contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: no kernels for the device of x.

    Source: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", 2022, section 3.
    """
    op = "int8_mixed_linear"
    check_input(op, "x", x, FLOATING)
    check_threshold(op, threshold)
    weight_scale, bias = check_int8_weight(op, qweight, weight_scale, bias, "x", x)
    y: Tensor = _library.ops.int8_mixed_linear(
        x, qweight, weight_scale, bias, threshold=threshold, per_element=per_element
    )
    return y


def _int8_linear_fake(
    q: Tensor,
    scale: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((*q.shape[:-1], qweight.shape[0]), dtype=out_dtype)


def _int8_mixed_linear_fake(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    threshold: float = 6.0,
    per_element: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _int8_mixed_linear_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    x, qweight, weight_scale, bias = inputs
    ctx.save_for_backward(qweight, weight_scale)  # not x: the gradient is linear in dy alone
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _int8_mixed_linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    qweight, weight_scale = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        # The scale goes to the weight, not to dy: small fp16 gradients would underflow.
        weight = (qweight * weight_scale.unsqueeze(-1)).to(ctx.x_dtype)
        dx = dy.matmul(weight)
    if ctx.needs_input_grad[3]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, None, dbias


_library.declare(
    "int8_linear",
    fake=_int8_linear_fake,
    backward=_library.not_differentiable(
        "int8_linear",
        "Run inference under torch.no_grad(); to train on top of frozen int8 weights use "
        "pumice.ops.int8_mixed_linear (pumice.nn.Int8MixedLinear).",
    ),
)
_library.declare(
    "int8_mixed_linear",
    fake=_int8_mixed_linear_fake,
    backward=_int8_mixed_linear_backward,
    setup_context=_int8_mixed_linear_setup,
)
