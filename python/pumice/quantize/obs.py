"""Optimal Brain Surgeon, column by column: round a weight, let the rest of its row make up for it.

For a linear layer with inputs X [tokens, K] the error of a changed row w + δ is δ H δᵀ with
H = 2/n · XᵀX. If one weight of the row is fixed to a value, the best the others can do is
δ = -e · (H⁻¹)_j: with e = (w_j - q_j) / (H⁻¹)_jj. Visiting the columns in one order for all rows,
the inverse Hessians that remain after each step are the rows of one upper Cholesky factor U,
H⁻¹ = UᵀU, which is why this is fast:

    e = (w_j - q_j) / U_jj        w_k -= e · U_jk   for k > j

Sources: Hassibi & Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
1992; Frantar & Alistarh, "Optimal Brain Compression", 2022; Frantar, Ashkboos, Hoefler, Alistarh,
"GPTQ", 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Damping, relative to the mean of the diagonal, is raised tenfold until the factor exists.
_LARGEST_DAMP = 10.0


def inverse_factor(hessian: Tensor, damp: float, where: str) -> Tensor:
    """U upper triangular with (H + damp · mean(diag H) · I)⁻¹ = UᵀU.

    With J the reversal of order, J H J = L Lᵀ gives U = J L⁻¹ J: one factorization and one
    triangular inverse, and H⁻¹ itself, the ill-conditioned step, is never formed. In float64, for
    the Hessians of language models span many orders of magnitude.

    Args:
        hessian: [K, K], symmetric; a zero on the diagonal is an input that was never active, which
            is taken as independent of the others.
        damp: at least 0. Raised tenfold, up to 10, as long as the matrix is not positive definite.
        where: names the layer in errors.

    Returns:
        U, fp32 [K, K].

    Raises:
        ValueError: the Hessian holds NaN or infinities, is zero, or stays singular.
    """
    h = hessian.double()
    if not bool(h.isfinite().all()):
        raise ValueError(
            f"{where}: its calibration inputs hold NaN or infinite values, or overflow when squared"
        )
    diagonal = h.diagonal()
    dead = diagonal == 0
    if bool(dead.all()):
        raise ValueError(
            f"{where} is dead: its input was zero on all calibration data, so there is nothing to "
            "judge its weights by; exclude it, or calibrate on other data"
        )
    mean = float(diagonal.mean())
    identity = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    while True:
        damped = h.clone()
        damped.diagonal().add_(damp * mean)
        damped.diagonal()[dead] = 1.0
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not bool(info):
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if bool(inverse.isfinite().all()):
                factor: Tensor = inverse.float().contiguous()
                return factor
        damp = max(10 * damp, 1e-6)
        if damp > _LARGEST_DAMP:
            raise ValueError(
                f"{where}: its Hessian is singular even with damping {damp / 10:g} of its mean "
                "diagonal; use more, or other, calibration data"
            )


def sweep(
    columns: Tensor,
    factor: Tensor,
    blocks: Sequence[tuple[int, int]],
    replace: Callable[[int], Tensor],
) -> None:
    """Visit the columns in order; each is replaced, and the later ones make up for the change.

    Lazy batches: within a block of columns each change is applied at once, beyond it all changes of
    the block together, by one matrix product, so that most of the work is GEMM.

    Args:
        columns: fp32 [K, N] contiguous, a *transposed* weight (a column is contiguous memory);
            changed in place, in the end to the replaced values.
        factor: U of :func:`inverse_factor`.
        blocks: (start, stop) of consecutive blocks that cover the columns.
        replace: called with j when ``columns[j]`` is up to date (as are the others of its block,
            and at the start of a block all of them); returns the new values [N].
    """
    for start, stop in blocks:
        errors = columns.new_empty(stop - start, columns.shape[1])
        for j in range(start, stop):
            new = replace(j)
            error = torch.sub(columns[j], new, out=errors[j - start]).div_(factor[j, j])
            columns[j] = new
            if j + 1 < stop:
                columns[j + 1 : stop].addr_(factor[j, j + 1 : stop], error, alpha=-1)
        if stop < len(columns):
            columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)


def aligned_blocks(k: int, group_size: int, block_size: int) -> list[tuple[int, int]]:
    """Blocks of about ``block_size`` columns such that no group begins in one and ends in another,
    unless it begins with it.

    A group's scale is chosen at its first column from all its columns, which must be up to date;
    those beyond the block are so only at the block's start.
    """
    if group_size <= block_size:
        step = block_size // group_size * group_size
        starts = list(range(0, k, step))
    else:
        starts = [
            j for g in range(0, k, group_size) for j in range(g, min(g + group_size, k), block_size)
        ]
    return list(zip(starts, [*starts[1:], k], strict=True))


def quadratic_error(delta: Tensor, hessian: Tensor) -> Tensor:
    """δ H δᵀ of each row of δ [N, K]."""
    error: Tensor = (delta @ hessian).mul_(delta).sum(1)
    return error
