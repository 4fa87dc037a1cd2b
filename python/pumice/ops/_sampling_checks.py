"""Checks of the arguments of the sampling operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pumice.ops._checks import (
    FLOATING,
    check_dtype,
    check_kernels,
    check_same_device,
    check_tensor,
    check_vector,
    shape_of,
)

# Sums of so many weights are exact in the kernels' integers.
MAX_VOCAB = 1 << 23


def check_vocab(op: str, name: str, tensor: Tensor) -> None:
    vocab = tensor.shape[-1]
    if not 1 <= vocab <= MAX_VOCAB:
        raise ValueError(
            f"{op}: the vocabulary, the last dimension of {name}, must be from 1 to {MAX_VOCAB}, "
            f"but {name} has shape {shape_of(tensor)}"
        )


def check_logits(op: str, logits: Any) -> None:
    check_tensor(op, "logits", logits)
    check_dtype(op, "logits", logits, FLOATING)
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits must have shape [R, V], not {shape_of(logits)}")
    check_vocab(op, "logits", logits)
    check_kernels(op, logits)


def _is_number(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def check_float_parameter(
    op: str, name: str, value: Any, off: float, limit: float, logits: Tensor
) -> Tensor | None:
    """A float from 0 to limit, or fp32 [R] or [1]; None where it changes nothing."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        sizes = (logits.shape[0], 1)
        return check_vector(op, name, value, sizes, (torch.float32,), "logits", logits)
    if not _is_number(value, (int, float)):
        raise TypeError(
            f"{op}: {name} must be a float or a float32 tensor, not {type(value).__name__}"
        )
    if not 0 <= value <= limit or math.isinf(value):
        upper = "and finite" if math.isinf(limit) else f"and at most {limit:g}"
        raise ValueError(f"{op}: {name} must be at least 0 {upper}, not {value}")
    if value == off:
        return None
    return torch.full((1,), value, dtype=torch.float32, device=logits.device)


def check_top_k(op: str, value: Any, logits: Tensor) -> Tensor | None:
    """An int, at least 0, or int32 [R] or [1]; None where it changes nothing."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        sizes = (logits.shape[0], 1)
        return check_vector(op, "top_k", value, sizes, (torch.int32,), "logits", logits)
    if not _is_number(value, (int,)):
        raise TypeError(
            f"{op}: top_k must be an int or an int32 tensor, not {type(value).__name__}"
        )
    if value < 0:
        raise ValueError(f"{op}: top_k must be at least 0 (0: all tokens), not {value}")
    if value == 0 or value >= logits.shape[1]:
        return None
    return torch.full((1,), value, dtype=torch.int32, device=logits.device)


def check_draws(
    op: str, uniforms: Any, seeds: Any, positions: Any, shape: tuple[int, ...], like: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Uniforms of a shape, or seeds and positions for each row; without, numbers of torch's own."""
    if (seeds is None) != (positions is None):
        given, missing = ("seeds", "positions") if positions is None else ("positions", "seeds")
        raise ValueError(f"{op}: {given} came without {missing}; they belong together")
    if seeds is None:
        if uniforms is None:
            return torch.rand(shape, device=like.device), None, None
        check_tensor(op, "uniforms", uniforms)
        check_dtype(op, "uniforms", uniforms, (torch.float32,))
        if uniforms.shape != shape:
            wanted = f"[{', '.join(map(str, shape))}]"
            raise ValueError(f"{op}: uniforms must have shape {wanted}, not {shape_of(uniforms)}")
        check_same_device(op, "uniforms", uniforms, "the first argument", like)
        return uniforms.contiguous(), None, None
    if uniforms is not None:
        raise ValueError(f"{op}: takes either uniforms or seeds and positions, not both")
    of_rows = [
        check_vector(op, name, value, shape[:1], (torch.int64,), "the first argument", like)
        for name, value in (("seeds", seeds), ("positions", positions))
    ]
    return None, of_rows[0], of_rows[1]


def check_drafts(op: str, draft_tokens: Any) -> Tensor:
    check_tensor(op, "draft_tokens", draft_tokens)
    check_dtype(op, "draft_tokens", draft_tokens, (torch.int64,))
    if draft_tokens.dim() != 2:
        raise ValueError(f"{op}: draft_tokens must have shape [B, N], not {shape_of(draft_tokens)}")
    check_kernels(op, draft_tokens)
    contiguous: Tensor = draft_tokens.contiguous()
    return contiguous


def check_parents(op: str, parents: Any, draft_tokens: Tensor) -> Tensor:
    check_tensor(op, "parents", parents)
    check_dtype(op, "parents", parents, (torch.int32,))
    if parents.shape != draft_tokens.shape:
        raise ValueError(
            f"{op}: parents must have the shape of draft_tokens, {shape_of(draft_tokens)}, not "
            f"{shape_of(parents)}"
        )
    check_same_device(op, "parents", parents, "draft_tokens", draft_tokens)
    contiguous: Tensor = parents.contiguous()
    return contiguous


def check_distributions(op: str, target_probs: Any, draft_probs: Any, draft_tokens: Tensor) -> None:
    """target_probs [B, N + 1, V] and draft_probs [B, N, V] or None; any strides."""
    batch, drafts = draft_tokens.shape
    check_tensor(op, "target_probs", target_probs)
    check_dtype(op, "target_probs", target_probs, (torch.float32,))
    if target_probs.dim() != 3 or target_probs.shape[:2] != (batch, drafts + 1):
        raise ValueError(
            f"{op}: target_probs must have shape [{batch}, {drafts + 1}, V], a row after each of "
            f"the {drafts} drafts and one before them, not {shape_of(target_probs)}"
        )
    check_vocab(op, "target_probs", target_probs)
    check_same_device(op, "target_probs", target_probs, "draft_tokens", draft_tokens)
    if draft_probs is None:
        return
    check_tensor(op, "draft_probs", draft_probs)
    check_dtype(op, "draft_probs", draft_probs, (torch.float32,))
    vocab = target_probs.shape[2]
    if draft_probs.shape != (batch, drafts, vocab):
        raise ValueError(
            f"{op}: draft_probs must have shape [{batch}, {drafts}, {vocab}], the vocabulary being "
            f"that of target_probs, not {shape_of(draft_probs)}"
        )
    check_same_device(op, "draft_probs", draft_probs, "draft_tokens", draft_tokens)
