"""The values a group of weights may take: W = (q - zero) · scale with q in 0 … 2^bits - 1.

Every group-wise method chooses its grids here: by the range of the weights, or by searching the
range whose rounding error is smallest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)

# The search of GPTQ's reference code: ranges of 1, 0.99, … 0.21 times the full one, judged by
# Σ|error|^2.4.
_SEARCH_STEPS = 100
_SEARCH_SHRINK = 0.8
_SEARCH_NORM = 2.4

# The search makes a dozen passes over the weights; in pieces of this many they stay in the cache.
_PIECE = 1 << 18


@dataclass(frozen=True)
class Grid:
    """How grids are chosen.

    Attributes:
        bits: 2, 3, 4 or 8.
        symmetric: the zero point is 2^(bits-1) everywhere. Otherwise an integer of its own for each
            group, and the grid spans min(w, 0) … max(w, 0).
        mse: search the range with the smallest error instead of taking the full one.
        scale_dtype: what scales are stored in. They are rounded to it *before* weights are rounded
            to the grid, so that no error is made afterwards.
    """

    bits: int = 4
    symmetric: bool = True
    mse: bool = False
    scale_dtype: torch.dtype = torch.float16

    @property
    def levels(self) -> int:
        """The largest q."""
        return int(2**self.bits) - 1

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for groups of weights.

        Args:
            weight: fp32 [..., g], finite; a group is the last dimension.

        Returns:
            scale and zero, fp32 [...], the scale positive and representable in ``scale_dtype``,
            the zero an integer. A symmetric grid reaches from -2^(b-1)·s to (2^(b-1)-1)·s with
            s = 2·max|w|/(2^b-1), so the largest weight is off by half a step, as others may be.
        """
        low, high = self._range(weight)
        scale, zero = self._from_range(low, high)
        if not self.mse:
            return scale, zero
        pieces = max(1, weight.numel() // _PIECE)
        flat = weight.reshape(-1, weight.shape[-1])
        found = [
            self._search(w, lo, hi)
            for w, lo, hi in zip(
                flat.chunk(pieces),
                low.reshape(-1).chunk(pieces),
                high.reshape(-1).chunk(pieces),
                strict=True,
            )
        ]
        return (
            torch.cat([s for s, _ in found]).view_as(scale),
            torch.cat([z for _, z in found]).view_as(zero),
        )

    def fit_groups(self, weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points [N, G] of a matrix [N, K]; the last group may be short."""
        n, k = weight.shape
        size = group_length(group_size, k)
        whole = k // size * size
        parts = []
        if whole:
            parts.append(self.fit(weight[:, :whole].reshape(n, -1, size)))
        if whole < k:
            parts.append(self.fit(weight[:, None, whole:]))
        return torch.cat([s for s, _ in parts], 1), torch.cat([z for _, z in parts], 1)

    def quantize(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """q = clamp(rint(w / scale) + zero), as floats; shapes broadcast."""
        return torch.round(weight / scale).add_(zero).clamp_(0, self.levels)

    def round_trip(self, weight: Tensor, group_size: int) -> Tensor:
        """The matrix [N, K] rounded to nearest on grids fitted to it."""
        k = weight.shape[1]
        scale, zero = (expand(t, group_size, k) for t in self.fit_groups(weight, group_size))
        return self.quantize(weight, scale, zero).sub_(zero).mul_(scale)

    def _range(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        low, high = weight.aminmax(dim=-1)
        if self.symmetric:
            high = torch.maximum(-low, high)
            return -high, high
        return low.clamp(max=0.0), high.clamp(min=0.0)

    def _from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = (high - low) / self.levels
        scale = scale.clamp_(min=_smallest_scale(self.scale_dtype))
        # A group of zeros would divide by zero; any scale represents it.
        scale = torch.where(high == low, torch.ones_like(scale), scale)
        scale = scale.to(self.scale_dtype).float()
        if self.symmetric:
            return scale, torch.full_like(scale, float(2 ** (self.bits - 1)))
        return scale, torch.round(-low / scale).clamp_(0, self.levels)

    def _search(self, weight: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        best = torch.full_like(low, float("inf"))
        scale, zero = torch.empty_like(low), torch.empty_like(low)
        for step in range(int(_SEARCH_SHRINK * _SEARCH_STEPS)):
            share = 1 - step / _SEARCH_STEPS
            s, z = self._from_range(low * share, high * share)
            rounded = self.quantize(weight, s[:, None], z[:, None])
            rounded = rounded.sub_(z[:, None]).mul_(s[:, None])
            error = rounded.sub_(weight).abs_().pow_(_SEARCH_NORM).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        return scale, zero


def group_length(group_size: int, k: int) -> int:
    """The number of columns of a group: ``group_size``, or all of them for -1."""
    return k if group_size == -1 else min(group_size, k)


def expand(per_group: Tensor, group_size: int, k: int) -> Tensor:
    """[N, G] to [N, K]: each column gets what its group has."""
    return per_group.repeat_interleave(group_length(group_size, k), dim=1)[:, :k]


def scale_dtype_for(weight: Tensor, bits: int) -> torch.dtype:
    """float16, unless the layer's weights are too large or too small for scales in it.

    Where the largest weight is 2^-10 or more, the smallest scale (2^-20) is an error of at most
    2^-11 of it.
    """
    largest = float(weight.abs().max())
    fits = largest >= 2.0**-10 and 2 * largest / (2**bits - 1) < 60000.0
    return torch.float16 if fits or largest == 0.0 else torch.float32


def _smallest_scale(dtype: torch.dtype) -> float:
    # In float16 a subnormal with four bits left; below, a scale would lose its meaning.
    return 2.0**-20 if dtype == torch.float16 else 2.0**-100


def check_grid(name: str, bits: object, group_size: object) -> None:
    """ValueError, naming the recipe, for bits or groups that no layout holds."""
    if bits not in BITS or isinstance(bits, bool):
        raise ValueError(f"{name}: bits must be one of {BITS}, not {bits!r}")
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"{name}: group_size must be an integer, not {group_size!r}")
    if group_size != -1 and (group_size < 16 or group_size % 16):
        raise ValueError(
            f"{name}: group_size must be a multiple of 16, or -1 for one group a row, not "
            f"{group_size}"
        )
