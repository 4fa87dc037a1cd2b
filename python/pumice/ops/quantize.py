"""Quantization of activations (and of weights, whose rows are treated as tokens)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.ops import _library
from pumice.ops._checks import (
    FLOATING,
    check_input,
    check_threshold,
    check_vector,
)


def int8_quantize(
    x: Tensor,
    *,
    per_tensor: bool = False,
    threshold: float | None = None,
    smooth: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to int8 by the absolute maximum, finding outlier columns in the same pass.

    With x' = x · smooth (x' = x without it), for each row m, or once for the tensor with
    ``per_tensor``::

        scale[m] = max_k |x'[m, k]| / 127
        q[m, k]  = round(x'[m, k] · 127 / max_k |x'[m, k]|)          (half to even)

    so that x' ≈ q · scale with an error of at most scale / 2. An absolute maximum below 2^-100
    counts as zero: scale = 0, q = 0. The arithmetic is fp32, its bits are the same on every device.

    With ``threshold`` t, elements with |x'| ≥ t are outliers: they are left out of the maximum and
    get q = 0, and a column holding one anywhere is marked in ``outliers`` (LLM.int8()'s test). NaN
    and ±Inf always are outliers, also for t = inf. Without a threshold, a row (or tensor, with
    ``per_tensor``) holding a NaN or ±Inf gets scale = NaN and q = 0: the damage stays visible and
    in its own row.

    With a static ``scale`` s (calibrated beforehand): q = clamp(round(x' / s), ±127), NaN gives 0.

    Args:
        x: fp32, fp16 or bf16 of shape [..., K], K ≥ 1; any strides; may be empty.
        per_tensor: one scale for the whole tensor instead of one for each row.
        threshold: positive; ``math.inf`` allowed. Excludes ``scale``.
        smooth: fp32 [K], multiplied into x first (SmoothQuant's 1/s).
        scale: fp32 [1], static; needs ``per_tensor=True``.

    Returns:
        ``(q, scale, outliers)``: q int8 of the shape of x; scale fp32 of shape x.shape[:-1], or [1]
        with ``per_tensor``; outliers bool [K], all False without ``threshold``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: no kernels for the device of x; or ``backward`` through the result, for the
            operator is not differentiable.

    Source: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", 2022 (vector-wise quantization, section 2; decomposition, section 3).
    """
    op = "int8_quantize"
    check_input(op, "x", x, FLOATING)
    if threshold is not None:
        check_threshold(op, threshold)
    if smooth is not None:
        smooth = check_vector(op, "smooth", smooth, (x.shape[-1],), (torch.float32,), "x", x)
    if scale is not None:
        if not per_tensor:
            raise ValueError(f"{op}: a given scale is one for the tensor; pass per_tensor=True")
        if threshold is not None:
            raise ValueError(f"{op}: scale and threshold exclude each other; pass one of them")
        scale = check_vector(op, "scale", scale, (1,), (torch.float32,), "x", x)
    q, scales, outliers = _library.ops.int8_quantize(
        x, per_tensor=per_tensor, threshold=threshold, smooth=smooth, scale=scale
    )
    return q, scales, outliers


def _fake(
    x: Tensor,
    per_tensor: bool = False,
    threshold: float | None = None,
    smooth: Tensor | None = None,
    scale: Tensor | None = None,
) -> Any:
    q = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty((1,) if per_tensor else x.shape[:-1], dtype=torch.float32)
    return q, scales, x.new_empty((x.shape[-1],), dtype=torch.bool)


_library.declare(
    "int8_quantize",
    fake=_fake,
    backward=_library.not_differentiable(
        "int8_quantize",
        "Run inference under torch.no_grad(); to train on top of frozen int8 weights use "
        "pumice.ops.int8_mixed_linear (pumice.nn.Int8MixedLinear).",
    ),
)
