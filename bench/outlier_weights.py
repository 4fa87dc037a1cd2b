"""Why the outlier columns are multiplied by *dequantized* weights.

LLM.int8() multiplies the outlier columns of x in 16 bit. Which columns those are is known only when
x is, so keeping 16-bit weights for them means keeping the whole 16-bit weight: three bytes a weight
in place of one. This measures what that would buy: the relative error of y against float64, with
either choice, over outlier magnitudes.
"""

from __future__ import annotations

import torch

N, K, M, COLUMNS = 1024, 1024, 64, 5
MAGNITUDES = (10.0, 30.0, 100.0)


def errors(magnitude: float, seed: int = 0) -> tuple[float, float, float]:
    """Relative errors: dequantized columns (pumice's op), kept 16-bit columns, no decomposition."""
    from pumice.ops import int8_linear, int8_mixed_linear, int8_quantize

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    x = torch.randn(M, K, generator=generator).clamp_(-5, 5)
    columns = torch.randperm(K, generator=generator)[:COLUMNS]
    x[:, columns] = magnitude * torch.randn(M, COLUMNS, generator=generator).sign()
    exact = x.double() @ weight.double().t()
    qweight, scale, _ = int8_quantize(weight)

    dequantized = int8_mixed_linear(x, qweight, scale, threshold=6.0).double()
    regular = x.clone()
    regular[:, columns] = 0
    outlying = x[:, columns].half().double() @ weight[:, columns].half().double().t()
    kept = int8_mixed_linear(regular, qweight, scale, threshold=6.0).double() + outlying
    q, x_scale, _ = int8_quantize(x)
    plain = int8_linear(q, x_scale, qweight, scale, out_dtype=torch.float32).double()

    def relative(y: torch.Tensor) -> float:
        return float((y - exact).norm() / exact.norm())

    return relative(dequantized), relative(kept), relative(plain)


def table() -> str:
    lines = [
        f"Relative error of y (M={M}, N={N}, K={K}, {COLUMNS} outlier columns), weight bytes:",
        "",
        "| outlier magnitude | dequantized (1 byte) | kept 16 bit (3 bytes) | no decomposition |",
        "|---|---|---|---|",
    ]
    for magnitude in MAGNITUDES:
        row = " | ".join(f"{value:.2e}" for value in errors(magnitude))
        lines.append(f"| {magnitude:g} | {row} |")
    return "\n".join(lines)
