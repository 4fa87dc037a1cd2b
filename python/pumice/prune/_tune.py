"""Train what pruning left, while the zeros stay zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pumice._calibrate import call

Objective = Literal["next_token", "teacher"]

_WARM_UP = 0.1  # of the steps
_LARGEST_GRADIENT = 1.0  # its norm, over all weights; longer ones are scaled down


@dataclass(frozen=True)
class Tuning:
    """How to train: see :class:`pumice.PruneAndTune`."""

    steps: int
    batch: int
    learning_rate: float
    rank: int
    objective: Objective


def tune(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    samples: Sequence[Any],
    tuning: Tuning,
    generator: torch.Generator,
    *,
    teacher: nn.Module | None,
    dtype: torch.dtype,
) -> list[float]:
    """Train the weights of some layers that are not zero; those that are, stay zero.

    Args:
        model: fp32, changed in place.
        layers: of it, whose nonzero weights (and, at full rank, biases) are trained.
        samples: calibration inputs, each one batch.
        tuning: how.
        generator: of the samples' order and the low-rank terms' beginnings.
        teacher: the uncompressed model, for the objective "teacher".
        dtype: that the products are computed in.

    Returns:
        The loss of each step.

    Raises:
        ValueError: a loss that is not finite; outputs or samples that the objective cannot use.
    """
    losses: list[float] = []
    order = _endless_order(len(samples), generator)
    device = next(model.parameters()).device
    with _trainable(model, layers, tuning.rank, generator) as parameters:
        optimizer = torch.optim.Adam(parameters, lr=tuning.learning_rate)
        for step in range(tuning.steps):
            for group in optimizer.param_groups:
                group["lr"] = tuning.learning_rate * _schedule(step, tuning.steps)
            total = 0.0
            for _ in range(tuning.batch):
                sample = _on(device, samples[next(order)])
                with torch.autocast(device.type, dtype=dtype, enabled=dtype == torch.bfloat16):
                    loss = _loss(model, sample, teacher) / tuning.batch
                loss.backward()
                total += float(loss.detach())
            if not math.isfinite(total):
                raise ValueError(
                    f"PruneAndTune: the loss is {total} at step {step} of tuning: lower "
                    f"learning_rate (now {tuning.learning_rate:g}), or look for NaN in the data"
                )
            nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
    return losses


@contextmanager
def _trainable(
    model: nn.Module, layers: Mapping[str, nn.Linear], rank: int, generator: torch.Generator
) -> Iterator[list[Tensor]]:
    """Gradients for what is to be trained alone; in the end for all that had them."""
    wanted = {id(p): (p, p.requires_grad) for p in model.parameters()}
    model.requires_grad_(False)
    parameters: list[Tensor] = []
    with torch.enable_grad(), ExitStack() as stack:
        for linear in layers.values():
            kept = linear.weight.detach() != 0
            if rank:
                term = _LowRank(linear.weight, kept, rank, generator)
                parametrize.register_parametrization(linear, "weight", term)
                stack.callback(parametrize.remove_parametrizations, linear, "weight")
                parameters += [term.a, term.b]
                continue
            weight = linear.weight
            weight.requires_grad_(True)
            # Adam without decay leaves a weight alone whose gradient was always zero.
            handle = weight.register_hook(_masking(kept))
            stack.callback(handle.remove)
            parameters.append(weight)
            if linear.bias is not None:
                linear.bias.requires_grad_(True)
                parameters.append(linear.bias)
        yield parameters
    for parameter, before in wanted.values():
        parameter.requires_grad_(before)


class _LowRank(nn.Module):
    """W + B A where W was kept, zero elsewhere; A [r, K], B [N, r], B begins as zero."""

    def __init__(self, weight: Tensor, kept: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        n, k = weight.shape
        a = torch.randn(rank, k, generator=generator) / math.sqrt(k)
        self.a = nn.Parameter(a.to(weight))
        self.b = nn.Parameter(weight.new_zeros(n, rank))
        self.register_buffer("gone", ~kept)

    def forward(self, weight: Tensor) -> Tensor:
        # Filled, for a product with zero may be -0.0.
        return (weight + self.b @ self.a).masked_fill(self.get_buffer("gone"), 0.0)


def _masking(kept: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * kept


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a linear start, then half a cosine down to zero."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _endless_order(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _loss(model: nn.Module, sample: Any, teacher: nn.Module | None) -> Tensor:
    """Nats for each predicted token."""
    logits = _logits(model, sample).float()
    if teacher is not None:
        with torch.no_grad():
            target = _logits(teacher, sample).float().log_softmax(-1)
        divergence = (target.exp() * (target - logits.log_softmax(-1))).sum(-1)
        return _mean(divergence, _token_mask(sample))
    ids = _token_ids(sample)
    if logits.shape[:-1] != ids.shape:
        raise ValueError(
            f"PruneAndTune: logits of shape {list(logits.shape)} do not predict token ids of shape "
            f"{list(ids.shape)}; pass objective='teacher'"
        )
    if ids.shape[1] < 2:
        raise ValueError("PruneAndTune: samples of one token have no next one to predict")
    surprise = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(len(ids), -1)
    mask = _token_mask(sample)
    return _mean(surprise, None if mask is None else mask[:, 1:] & mask[:, :-1])


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _logits(model: nn.Module, sample: Any) -> Tensor:
    output = call(model, sample)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            "PruneAndTune: the model must return logits, or an object with .logits, not a "
            f"{type(output).__name__}"
        )
    return logits


def _token_ids(sample: Any) -> Tensor:
    found = sample
    if isinstance(sample, Mapping):
        found = sample.get("input_ids")
    elif isinstance(sample, (tuple, list)):
        found = sample[0] if sample else None
    if not isinstance(found, Tensor) or found.is_floating_point() or found.dim() != 2:
        raise ValueError(
            "PruneAndTune: the objective 'next_token' needs samples of token ids [batch, tokens]; "
            "pass objective='teacher' for a model of anything else"
        )
    return found.long()


def _token_mask(sample: Any) -> Tensor | None:
    mask = sample.get("attention_mask") if isinstance(sample, Mapping) else None
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _on(device: torch.device, sample: Any) -> Any:
    if isinstance(sample, Tensor):
        return sample.to(device)
    if isinstance(sample, Mapping):
        return {key: _on(device, value) for key, value in sample.items()}
    if isinstance(sample, (tuple, list)):
        return [_on(device, value) for value in sample]
    return sample
