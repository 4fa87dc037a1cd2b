"""2:4 weights: of every four along K two are kept, with the places where they stood.

The layout is one for all devices and for the state dict (``csrc/common/sparse24_layout.h``)::

    values  [N, K/2]                 the kept weights of a row in the order of their columns
    meta    uint8 [N, ceil(K/32)·4]  a little-endian stream of 2-bit places: kept weight j stood in
                                     column c(n, j) = 4·(j // 2) + (bits 2j, 2j+1 of row n)

so that each group of four columns is a nibble, ``place0 | place1 << 2`` with place0 < place1, the
even group in the low half of its byte; a row of meta is filled up to whole 32-bit words with
nibbles 0x4. A group with fewer than two nonzeros keeps zeros in its lowest free columns: a matrix
has one compressed form. K is a multiple of 4; nothing else is asked of N and K.

Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, whose format it is but for
the order of groups in a word, which ``mma.sp`` reads as it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pumice.ops import _library
from pumice.ops import _sparse_fakes as _sparse_fakes
from pumice.ops._checks import (
    FLOATING,
    MAX_INT8_K,
    check_dtype,
    check_input,
    check_same_device,
    check_tensor,
    check_vector,
    shape_of,
)
from pumice.ops._int4_checks import check_bits, check_weight
from pumice.ops._sparse_checks import (
    DTYPES,
    check_bias,
    check_columns,
    check_contiguous,
    check_dense,
    check_group_size,
    check_is_sparse24,
    check_meta,
    check_packed,
    check_values,
    kept_group_size,
)


def sparse24_compress(w: Tensor) -> tuple[Tensor, Tensor]:
    """Compress a matrix that is 2:4: no group of four along K holds more than two nonzeros.

    -0.0 is zero (it may be kept, or become 0.0); NaN is a nonzero. Differentiable: the gradient of
    ``values`` goes to the kept places.

    Args:
        w: fp32, fp16, bf16 or int8 [N, K], N, K ≥ 1, K a multiple of 4.

    Returns:
        values [N, K/2] of the dtype of w, and meta (see above).

    Raises:
        TypeError: w is no tensor, or of another dtype.
        ValueError: a wrong shape; or w is not 2:4: the first such row and group are named. To know,
            a call on a GPU waits for it; inside ``torch.compile`` only the CPU looks (and raises
            RuntimeError), and on CUDA two of the nonzeros of such a group are kept.
        RuntimeError: no kernels for the device of w.
    """
    op = "sparse24_compress"
    check_dense(op, "w", w)
    if not torch.compiler.is_compiling() and not w.is_meta:
        check_is_sparse24(op, "w", w)
    values, meta = _library.ops.sparse24_compress(w)
    return values, meta


def sparse24_gather(w: Tensor, meta: Tensor) -> Tensor:
    """The elements of any matrix at the places of a compressed one: values[n, j] = w[n, c(n, j)].

    Args:
        w: fp32, fp16, bf16 or int8 [N, K], 2:4 or not.
        meta: uint8 [N, ceil(K/32)·4].

    Returns:
        values [N, K/2] of the dtype of w.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: no kernels for the device of w.
    """
    op = "sparse24_gather"
    check_dense(op, "w", w)
    meta = check_meta(op, meta, w.shape[0], w.shape[1], "w", w)
    values: Tensor = _library.ops.sparse24_gather(w, meta)
    return values


def sparse24_decompress(values: Tensor, meta: Tensor) -> Tensor:
    """The matrix [N, K] itself: w[n, c(n, j)] = values[n, j], zero elsewhere.

    Args:
        values: fp32, fp16, bf16 or int8 [N, K/2], K a multiple of 4.
        meta: uint8 [N, ceil(K/32)·4].

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: no kernels for the device of values.
    """
    _, _, meta = check_values("sparse24_decompress", values, meta, DTYPES)
    w: Tensor = _library.ops.sparse24_decompress(values.contiguous(), meta)
    return w


def sparse24_linear(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer with floating-point 2:4 weights.

    ::

        y[m, n] = Σ_{j < K/2} x[m, c(n, j)] · values[n, j] + bias[n]

    summed in fp32, rounded once to the dtype of x. With few rows only the kept weights and their
    places are read, 1/2 + 1/16 of the bytes of a 16-bit matrix; with more the weight is multiplied
    by the sparse tensor cores (CUDA; in fp32 by the ordinary ones, from 64 rows on by torch's
    product with the weight written out), or by vectors of its rows (CPU), where a row's bits may
    then differ from those it has among few. In bf16 a CPU's instruction for it takes what is below
    2^-126 as zero, as torch's product does. A NaN or an infinity in x reaches every output whose
    weight keeps its column, and it may reach others of its row, as 0 · NaN; other rows are
    unharmed.

    Differentiable in x (dx = dy · W, W written out for the while), in ``values`` (the product
    dyᵀ · x at the kept places: fine-tuning under a fixed mask) and in ``bias``.

    Args:
        x: fp32, fp16 or bf16 [..., K]; may be empty, of any strides.
        values: of the dtype of x [N, K/2], contiguous; from :func:`sparse24_compress`.
        meta: uint8 [N, ceil(K/32)·4].
        bias: fp32, fp16 or bf16 [N].

    Returns:
        y of shape [..., N] and the dtype of x, contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: no kernels for the device of x.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.
    """
    op = "sparse24_linear"
    check_input(op, "x", x, FLOATING)
    n, k, meta = check_values(op, values, meta, (x.dtype,))
    check_columns(op, "x", x, k, "values")
    check_same_device(op, "values", values, "x", x)
    check_contiguous(op, "values", values)
    y: Tensor = _library.ops.sparse24_linear(x, values, meta, check_bias(op, bias, n, "x", x))
    return y


def sparse24_int8_linear(
    q: Tensor,
    scale: Tensor,
    values: Tensor,
    meta: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """:func:`int8_linear` with int8 2:4 weights.

    ::

        y[m, n] = (Σ_{j < K/2} q[m, c(n, j)] · values[n, j]) · scale[m] · weight_scale[n] + bias[n]

    The sum is exact in int32, the rest fp32, rounded once to ``out_dtype``: to the bit what
    :func:`int8_linear` gives for the matrix written out.

    Args:
        q: int8 [..., K]; may be empty.
        scale: fp32, one for each row of q, or one for all (1 element).
        values: int8 [N, K/2], contiguous, K ≤ 131068.
        meta: uint8 [N, ceil(K/32)·4].
        weight_scale: fp32 [N] (per channel) or [1] (per tensor).
        bias: fp32, fp16 or bf16 [N].
        out_dtype: torch.float32, torch.float16 or torch.bfloat16.

    Returns:
        y of shape [..., N] and dtype ``out_dtype``, contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: no kernels for the device of q; or ``backward`` through the result.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.
    """
    op = "sparse24_int8_linear"
    check_input(op, "q", q, (torch.int8,))
    if out_dtype not in FLOATING:
        raise TypeError(f"{op}: out_dtype must be float32, float16 or bfloat16, not {out_dtype}")
    n, k, meta = check_values(op, values, meta, (torch.int8,))
    check_columns(op, "q", q, k, "values")
    if k > MAX_INT8_K:
        raise ValueError(
            f"{op}: values has K = {k} input features; beyond {MAX_INT8_K} int32 sums can overflow"
        )
    check_same_device(op, "values", values, "q", q)
    check_contiguous(op, "values", values)
    check_tensor(op, "scale", scale)
    check_dtype(op, "scale", scale, (torch.float32,))
    check_same_device(op, "scale", scale, "q", q)
    # The first test is the usual case, and puts no condition on a symbolic number of rows.
    if scale.shape != q.shape[:-1] and scale.numel() not in (1, q.numel() // k):
        raise ValueError(
            f"{op}: scale must hold one element or one for each row of q {shape_of(q)}, but has "
            f"shape {shape_of(scale)}"
        )
    if isinstance(weight_scale, Tensor) and weight_scale.requires_grad:
        raise ValueError(
            f"{op}: weight_scale requires a gradient, but quantized weights are frozen; detach it"
        )
    weight_scale = check_vector(op, "weight_scale", weight_scale, (n, 1), (torch.float32,), "q", q)
    y: Tensor = _library.ops.sparse24_int8_linear(
        q,
        scale.flatten(),
        values,
        meta,
        weight_scale,
        check_bias(op, bias, n, "q", q),
        out_dtype=out_dtype,
    )
    return y


def sparse24_int4_linear(
    x: Tensor,
    qvalues: Tensor,
    meta: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_size: int,
    bits: int = 4,
) -> Tensor:
    """A linear layer with 2:4 weights of a few bits, as SparseGPT and its 4-bit grid give them.

    ::

        W[n, c(n, j)] = (q[n, j] - zeros[n, g]) · scales[n, g],   g = c(n, j) // group_size
        y[m, n]       = Σ_k x[m, k] · W[n, k] + bias[n]

    and W is zero where nothing is kept. The kept values are an ordinary packed weight of K/2
    columns in groups of group_size/2::

        W = sparse24_decompress(int4_dequantize(qvalues, scales, zeros, k=K/2, ...), meta)

    Weights and places are 0.75 of the bytes of a dense 4-bit weight. The arithmetic is that of
    :func:`int4_linear`: on the CPU exact products of digits of x, on CUDA fp32 sums of
    products in the dtype of x. Differentiable in x and in ``bias``.

    Args:
        x: fp32, fp16 or bf16 [..., K], K a multiple of 4; may be empty, of any strides.
        qvalues: int32 [N, ceil(K/2 · bits / 32)], contiguous, from :func:`int4_pack`.
        meta: uint8 [N, ceil(K/32)·4].
        scales: fp16, bf16 or fp32 [N, G], G = ceil(K / group_size).
        zeros: uint8 [N, G] below 2^bits, or [N, G] in the dtype of ``scales``; None: 2^(bits-1).
        bias: fp32, fp16 or bf16 [N].
        group_size: columns of W; -1 or a positive multiple of 32.
        bits: 2, 3, 4 or 8; kernels of their own have 4.

    Returns:
        y of shape [..., N] and the dtype of x, contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: a zero point out of range, on the CPU; no kernels for the device of x.

    Source: Frantar and Alistarh, "SparseGPT", 2023, and Frantar et al., "MARLIN", 2024 (the joint
    format); Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.
    """
    op = "sparse24_int4_linear"
    check_input(op, "x", x, FLOATING)
    check_bits(op, bits)
    check_group_size(op, group_size)
    k = x.shape[-1]
    if k % 4 != 0:
        raise ValueError(f"{op}: K, the last dimension of x, must be a multiple of 4, not {k}")
    check_packed(op, qvalues, scales, k, group_size, bits)
    scales, zeros, _ = check_weight(
        op, qvalues, scales, zeros, None, k // 2, kept_group_size(group_size), bits
    )
    check_same_device(op, "qvalues", qvalues, "x", x)
    n = qvalues.shape[0]
    meta = check_meta(op, meta, n, k, "x", x)
    y: Tensor = _library.ops.sparse24_int4_linear(
        x,
        qvalues,
        meta,
        scales,
        zeros,
        check_bias(op, bias, n, "x", x),
        group_size=group_size,
        bits=bits,
    )
    return y
