"""GPTQ derived anew, slowly: the OBS problem solved with an explicit inverse for every column."""

import torch
from torch import Tensor


def grid_of(w: Tensor, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale (rounded to fp16, as it is stored) and zero of one group of one row."""
    low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    if symmetric:
        high = float(w.abs().max())
        low = -high
    scale = float(torch.tensor((high - low) / (2**bits - 1)).half())
    if high == low:
        return 1.0, 2 ** (bits - 1) if symmetric else 0
    return scale, 2 ** (bits - 1) if symmetric else round(-low / scale)


def nearest(w: float, scale: float, zero: int, bits: int) -> int:
    return min(max(round(w / scale) + zero, 0), 2**bits - 1)


def solve(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    damp: float,
    order: list[int],
    static: bool,
) -> tuple[Tensor, Tensor]:
    """Quantized values and the dequantized matrix, both in the order of the inputs, float64."""
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    h += damp * h.diagonal().mean() * torch.eye(len(h))
    h[dead, dead] = 1.0
    rows = [
        _solve_row(w, h, hessian.double(), bits, group_size, symmetric, order, static)
        for w in weight.double()
    ]
    return torch.stack([q for q, _ in rows]), torch.stack([w for _, w in rows])


def _solve_row(w, h, undamped, bits, group_size, symmetric, order, static):
    k = len(w)
    place = list(range(k)) if static else [order.index(i) for i in range(k)]
    group = [p // group_size for p in place]
    members = {g: [i for i in order if group[i] == g] for g in set(group)}
    plain = {g: grid_of(w[of], bits, symmetric) for g, of in members.items()}
    q, result, grids = torch.zeros(k), w.clone(), dict(plain)
    for step, i in enumerate(order):
        if not static and (step == 0 or group[order[step - 1]] != group[i]):
            grids[group[i]] = grid_of(result[members[group[i]]], bits, symmetric)
        scale, zero = grids[group[i]]
        q[i] = nearest(float(result[i]), scale, zero, bits)
        left = order[step:]
        inverse = torch.linalg.inv(h[left][:, left])
        error = (result[i] - (q[i] - zero) * scale) / inverse[0, 0]
        result[left] -= error * inverse[0]
        result[i] = (q[i] - zero) * scale
    # A row that rounding to nearest serves better is rounded to nearest.
    q_near, near = torch.zeros(k), w.clone()
    for i in range(k):
        scale, zero = plain[group[i]]
        q_near[i] = nearest(float(w[i]), scale, zero, bits)
        near[i] = (q_near[i] - zero) * scale
    if (near - w) @ undamped @ (near - w) < (result - w) @ undamped @ (result - w):
        return q_near, near
    return q, result
