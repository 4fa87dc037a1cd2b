"""What the int8 operators compute, written from their formulas alone: the oracle of the tests.

numpy in float64, or in float32 where the definition says so. Nothing here is shared with the code
under test.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
F32 = np.float32

# Half a unit in the last place, relative: the error of one rounding.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SMALLEST_NORMAL = {torch.float32: 2.0**-126, torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126}


def as_float32(x: Tensor) -> npt.NDArray[np.float32]:
    return x.detach().float().cpu().numpy()


def as_float64(x: Tensor) -> Array:
    return x.detach().double().cpu().numpy()


def quantize(
    x: Tensor,
    *,
    per_tensor: bool = False,
    threshold: float | None = None,
    smooth: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """int8_quantize, bit by bit: every operation one rounding to float32, as defined."""
    k = x.shape[-1]
    values = as_float32(x).reshape(-1, k)
    with np.errstate(all="ignore"):
        if smooth is not None:
            values = values * as_float32(smooth)
        outlying = np.zeros_like(values, dtype=bool)
        if threshold is not None:
            outlying = ~(np.abs(values) < F32(threshold))
        if scale is not None:
            inverse = F32(1) / as_float32(scale)
            q = np.nan_to_num(np.clip(np.rint(values * inverse), -127, 127), nan=0.0)
            scales = as_float32(scale)
        else:
            regular = np.where(outlying, F32(0), values)
            groups = regular.reshape(1, -1) if per_tensor else regular
            absmax = np.max(np.abs(groups), axis=1, initial=F32(0))
            broken = ~np.isfinite(absmax)
            tiny = absmax < F32(2.0**-100)
            scales = np.where(tiny, F32(0), absmax / F32(127))
            inverse = np.where(tiny, F32(0), F32(127) / absmax)
            scales[broken] = np.nan
            q = np.where(broken[:, None], F32(0), np.rint(groups * inverse[:, None]))
        q = q.reshape(x.shape)
    shape = (1,) if per_tensor else x.shape[:-1]
    return (
        torch.from_numpy(q.astype(np.int8)),
        torch.from_numpy(scales.astype(np.float32)).reshape(shape),
        torch.from_numpy(outlying.any(axis=0)),
    )


def integer_product(q: Tensor, qweight: Tensor) -> Array:
    """Σ_k q·w. In float64, exact: products below 2^14 and K below 2^17 stay far below 2^53."""
    return as_float64(q).reshape(-1, q.shape[-1]) @ as_float64(qweight).T


def linear(
    q: Tensor, scale: Tensor, qweight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> tuple[Array, Array]:
    """int8_linear [M, N], and the magnitude of its terms, which bounds the rounding errors."""
    product = integer_product(q, qweight)
    product = product * as_float64(scale).reshape(-1, 1) * as_float64(weight_scale)
    offset = as_float64(bias) if bias is not None else np.zeros(qweight.shape[0])
    return product + offset, np.abs(product) + np.abs(offset)


def dequantized_linear(
    x: Tensor, qweight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Array:
    """x @ (qweight·weight_scale)^T + bias: what int8_mixed_linear approximates."""
    weight = as_float64(qweight) * as_float64(weight_scale).reshape(-1, 1)
    y = as_float64(x).reshape(-1, x.shape[-1]) @ weight.T
    return y if bias is None else y + as_float64(bias)


def mixed_linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    per_element: bool,
) -> tuple[Array, Array]:
    """int8_mixed_linear [M, N] of finite x, and the magnitude of its terms."""
    q, scale, outliers = quantize(x, threshold=threshold)
    k = x.shape[-1]
    values = as_float32(x).reshape(-1, k)
    rows, scales = q.reshape(-1, k), scale.reshape(-1, 1)
    kept = torch.from_numpy(values - as_float32(scales) * as_float32(rows)).to(x.dtype)
    residual = as_float64(kept)
    if per_element:
        residual = np.where(np.abs(values) < F32(threshold), 0.0, residual)
    else:
        residual = np.where(outliers.numpy(), residual, 0.0)
    weight = as_float64(qweight)
    weights_scale = as_float64(weight_scale)
    regular = integer_product(rows, qweight) * as_float64(scales)
    y = (regular + residual @ weight.T) * weights_scale
    magnitude = (np.abs(regular) + np.abs(residual) @ np.abs(weight).T) * weights_scale
    offset = as_float64(bias) if bias is not None else np.zeros(qweight.shape[0])
    return y + offset, magnitude + np.abs(offset)


def plain_torch_mixed_linear(
    x: Tensor, qweight: Tensor, weight_scale: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """LLM.int8() as one writes it with torch operators, in the dtype of x: the yardstick."""
    flat = x.reshape(-1, x.shape[-1])
    outlying = ~(flat.abs() < threshold)
    columns = outlying.any(0)
    absmax = flat.masked_fill(outlying, 0).abs().amax(1, keepdim=True).float()
    scale = (absmax / 127).clamp_min(1e-30)
    q = (flat.masked_fill(columns, 0).float() / scale).round().clamp(-127, 127)
    regular = (q.double() @ qweight.double().T).float() * scale * weight_scale
    weight = (qweight[:, columns] * weight_scale.reshape(-1, 1)).to(x.dtype)
    y = regular.to(x.dtype) + flat[:, columns] @ weight.T
    if bias is not None:
        y = y + bias.to(x.dtype)
    return y.reshape(*x.shape[:-1], -1)


def assert_rounded(
    y: Tensor, exact: Array, magnitude: Array, *, extra: float = 8 * 2.0**-24
) -> None:
    """y is `exact` rounded to y's dtype, give or take float32 roundings of its terms."""
    actual = as_float64(y).reshape(exact.shape)
    limit = float(torch.finfo(y.dtype).max)
    inside = np.abs(exact) < 0.99 * limit
    unit = 2 * ROUNDING[y.dtype]
    allowed = unit * np.maximum(np.abs(exact), SMALLEST_NORMAL[y.dtype]) + extra * magnitude
    wrong = inside & ~(np.abs(actual - exact) <= allowed)
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} wrong, first at {tuple(np.argwhere(wrong)[0])}: "
        f"{actual[wrong][0]!r} is not {exact[wrong][0]!r} ± {allowed[wrong][0]:.3g}"
    )


def relative_error(y: Tensor, exact: Array) -> float:
    actual = as_float64(y).reshape(exact.shape)
    return float(np.linalg.norm(actual - exact) / np.linalg.norm(exact))
