"""Gradients of attention: those of pumice on a backend, and those of its formulas by autograd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attention_reference as reference
import pumice
from attention_cases import AttentionCase, Inputs, inputs, laid_out, offsets, to_device
from backends import Backend
from reference import ROUNDING

NAMES = ("query", "key", "value", "sinks")


@dataclass(frozen=True)
class Upstream:
    """Gradients of a sequence's out [S_q, H, D_v] and lse [H, S_q]; None: not used by the loss."""

    out: Tensor | None
    lse: Tensor | None


def upstream(given: Inputs, used: str = "both") -> list[Upstream]:
    """Random ones; `used` is "out", "lse" or "both". Zero for an lse of -inf."""
    case = given.case
    g = torch.Generator().manual_seed(case.seed + 1)
    found = []
    for (queries, _), (_, lse) in zip(case.lengths, given.exact(), strict=True):
        grad_out = torch.randn(queries, case.heads, case.value_dim, generator=g).to(case.dtype)
        grad_lse = torch.randn(case.heads, queries, generator=g)
        grad_lse = torch.where(lse.isfinite(), grad_lse, 0.0)
        found.append(
            Upstream(None if used == "lse" else grad_out, None if used == "out" else grad_lse)
        )
    return found


def expected(given: Inputs, wanted: list[Upstream], dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of the formulas, by torch's autograd in dtype; sequences one after another."""
    parts: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for b, (operands, up) in enumerate(zip(given.sequences, wanted, strict=True)):
        slopes, mask = given.alibi_slopes, given.mask
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        if mask is not None and mask.shape[0] > 1:
            mask = mask[b : b + 1]
        leaves = [x.detach().to(dtype).requires_grad_() for x in operands]
        sinks = None
        if given.sinks is not None:
            sinks = given.sinks.detach().to(dtype).requires_grad_()
            leaves.append(sinks)
        query, key, value = (x[None] for x in leaves[:3])
        out, lse = reference.attention(query, key, value, given.options[b], sinks=sinks,
                                       alibi_slopes=slopes, mask=mask, dtype=dtype)  # fmt: skip
        loss = torch.stack([x.sum() for x in leaves]).sum() * 0  # so that it depends on each
        if up.out is not None:
            loss = loss + (out[0] * up.out.to(dtype)).sum()
        if up.lse is not None:
            loss = loss + (torch.where(lse[0].isfinite(), lse[0], 0.0) * up.lse.to(dtype)).sum()
        for name, gradient in zip(NAMES, torch.autograd.grad(loss, leaves), strict=False):
            parts[name].append(gradient)
    found = {name: torch.cat(parts[name]) for name in NAMES[:3]}
    if given.sinks is not None:
        found["sinks"] = torch.stack(parts["sinks"]).sum(0)
    return found


def gradients(
    backend: Backend, given: Inputs, wanted: list[Upstream], *, poison: int = 0
) -> dict[str, Tensor]:
    """Those of pumice on the CPU, laid out likewise; packed sequences amid so many rows of NaN."""
    case = given.case
    keywords: dict[str, Any] = {k: to_device(v, backend.device) for k, v in given.keywords.items()}
    sinks = keywords.get("sinks")
    if sinks is not None:
        keywords["sinks"] = sinks = sinks.clone().requires_grad_()

    def joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
        if not case.packed:
            return torch.stack(tensors).to(backend.device)
        shape = list(tensors[0].shape)
        shape[dim] = poison
        around = torch.full(shape, torch.nan, dtype=tensors[0].dtype)
        return torch.cat([around, *tensors, around], dim=dim).to(backend.device)

    operands = [joined(list(tensors)) for tensors in zip(*given.sequences, strict=True)]
    leaves = [laid_out(x, case.layout).detach().requires_grad_() for x in operands]
    if case.packed:
        q_lengths, k_lengths = zip(*case.lengths, strict=True)
        out, lse = pumice.ops.flash_attention_varlen(
            *leaves,
            offsets(q_lengths, poison).to(backend.device),
            offsets(k_lengths, poison).to(backend.device),
            max_seqlen_q=max(q_lengths),
            max_seqlen_k=max(k_lengths),
            **keywords,
            return_lse=True,
        )
    else:
        out, lse = pumice.ops.flash_attention(*leaves, **keywords, return_lse=True)
    outputs, upstreams = [], []
    if wanted[0].out is not None:
        outputs.append(out)
        upstreams.append(laid_out(joined([up.out for up in wanted]), case.layout))  # type: ignore
    if wanted[0].lse is not None:
        outputs.append(lse)
        upstreams.append(joined([up.lse for up in wanted], dim=1))  # type: ignore
    leaves = leaves if sinks is None else [*leaves, sinks]
    found = dict(zip(NAMES, torch.autograd.grad(outputs, leaves, upstreams), strict=False))
    for name, leaf in zip(NAMES, leaves, strict=False):
        gradient = found[name]
        assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype)
        if name == "sinks":
            found[name] = gradient.cpu()
        elif case.packed:
            outside = [*range(poison), *range(len(gradient) - poison, len(gradient))]
            assert not gradient[outside].any(), name
            found[name] = gradient[poison : len(gradient) - poison].cpu()
        else:
            found[name] = gradient.flatten(0, 1).cpu()
    return found


def delta_unit(given: Inputs, wanted: list[Upstream]) -> float:
    """What the rounding of out to its dtype, before delta = out·grad_out is taken of it, may cost
    the gradients of query and key; plain torch has no delta."""
    size = 0.0
    for operands, (out, _), up in zip(given.sequences, given.exact(), wanted, strict=True):
        if up.out is not None and out.numel():
            terms = (out * up.out.double()).norm(dim=-1)
            size = max(size, float(terms.max()) * max(map(reference.largest, operands[:2])))
    scale = abs(given.case.softmax_scale or given.case.dim**-0.5)
    return ROUNDING[given.case.dtype] * scale * size


def check(backend: Backend, case: AttentionCase, used: str = "both", poison: int = 0) -> None:
    """A case against float64, by FlashAttention's rule; an error of a score is one of its weight's
    share, so what the sum of a score's products may round to is allowed for."""
    given = inputs(case)
    wanted = upstream(given, used)
    found = gradients(backend, given, wanted, poison=poison)
    exact = expected(given, wanted, torch.float64)
    plain = expected(given, wanted, case.dtype)
    assert found.keys() == exact.keys()
    rounding = reference.rounding(case.dtype) + given.lse_unit() / 8
    for name, gradient in found.items():
        unit = rounding * max(1.0, reference.largest(exact[name]))
        if name in ("query", "key"):
            unit += delta_unit(given, wanted)
        reference.assert_as_exact_as_plain(gradient, exact[name], plain[name], unit, name)
