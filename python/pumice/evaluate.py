"""What compression costs and what it buys: perplexity, size, speed.

Everything here takes any causal language model: a module called as ``model(input_ids)`` with
``input_ids`` [B, S] int64 that returns logits [B, S, V], or an object with such ``.logits`` as
transformers' models do.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pumice._calibrate import evaluation_mode

_LOGIT_ROWS = 256  # rows of float32 logits at a time: vocabularies reach 256 K entries


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood per predicted token), and what it was computed from."""

    perplexity: float
    mean_nll: float  # nats per token
    window_nll: tuple[float, ...]  # mean over each window's predicted tokens
    context: int  # tokens a window
    tokens: int  # predicted tokens: (context − 1) a window

    def relative_to(self, baseline: Perplexity) -> tuple[float, float]:
        """This perplexity over the baseline's, and the standard error of that ratio.

        Both must come from the same windows: the error is that of the *paired* per-window
        differences, d̄ ± s_d/√n in nats, which cancels how hard each window is for any model.
        """
        if (self.context, len(self.window_nll)) != (baseline.context, len(baseline.window_nll)):
            raise ValueError(
                f"perplexities of different windows cannot be paired: {len(self.window_nll)} × "
                f"{self.context} tokens against {len(baseline.window_nll)} × {baseline.context}"
            )
        differences = [a - b for a, b in zip(self.window_nll, baseline.window_nll, strict=True)]
        mean = statistics.fmean(differences)
        count = len(differences)
        if count == 1:
            return _exp(mean), math.nan
        # Not statistics.stdev, which refuses NaN: that a model broke down is a result.
        variance = sum((difference - mean) ** 2 for difference in differences) / (count - 1)
        return _exp(mean), _exp(mean) * math.sqrt(variance / count)


@dataclass(frozen=True)
class Throughput:
    """Tokens a second, medians over the repeats; the samples themselves are kept."""

    prefill: float
    decode: float
    prefill_samples: tuple[float, ...]
    decode_samples: tuple[float, ...]
    prefill_tokens: int
    decode_tokens: int


def perplexity(
    model: nn.Module,
    token_ids: Tensor | Sequence[int],
    *,
    context: int = 512,
    windows: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of one long text, the way WikiText-2 results are reported.

    The tokens are cut into non-overlapping windows of ``context``; a last, shorter one is dropped.
    Each window is run alone from an empty context and predicts all its tokens but the first:

        perplexity = exp( 1/T · Σ_w Σ_{i≥1} −log p(token_i | token_0 … token_{i−1}) )

    Args:
        model: see the module's docstring. Runs on its parameters' device, in evaluation mode.
        token_ids: [tokens] integers.
        context: tokens a window, ≥ 2 and at most what the model was made for.
        windows: evaluate only that many, evenly spaced over the text so that they sample all of
            it; by default every window.
        on_window: called as ``on_window(done, total)`` after each.

    Raises:
        TypeError, ValueError: the tokens are not a vector of integers within the vocabulary, too
            few for one window (or for ``windows``), or the context is out of range.
    """
    ids = _token_vector(model, token_ids)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context < 2 or (limit is not None and context > limit):
        raise ValueError(f"context must be in 2…{limit or '∞'} tokens, got {context}")
    available = ids.numel() // context
    total = available if windows is None else windows
    if not 1 <= total <= available:
        raise ValueError(
            f"{ids.numel()} tokens give {available} windows of {context}, but "
            f"{'at least 1 is' if windows is None else f'{windows} were'} needed"
        )
    window_nll = []
    with _inference(model) as device:
        for done in range(total):
            start = (done * available // total) * context
            window = ids[start : start + context].to(device)
            window_nll.append(_mean_nll(_logits(model(window[None]))[0], window))
            if on_window:
                on_window(done + 1, total)
    mean = statistics.fmean(window_nll)  # every window predicts equally many tokens
    return Perplexity(_exp(mean), mean, tuple(window_nll), context, total * (context - 1))


def throughput(
    model: nn.Module,
    token_ids: Tensor | Sequence[int],
    *,
    prefill: int = 512,
    decode: int = 32,
    repeats: int = 3,
    warmup: int = 1,
    on_repeat: Callable[[int, int], None] | None = None,
) -> Throughput:
    """Tokens a second of one sequence (batch 1): reading a prompt, then generating greedily.

    Prefill runs ``prefill`` tokens at once and asks for the last position's logits only, as
    generation does. Decode feeds back one token at a time through the key–value cache that the
    prefill filled. ``warmup`` untimed rounds come first; then the median of ``repeats`` is taken.

    Args:
        model: a transformers causal language model (it must take ``past_key_values``).
        token_ids: [tokens] integers, at least ``prefill`` of them: the prompt.
        on_repeat: called as ``on_repeat(done, total)`` after each round, untimed ones included.

    Raises:
        TypeError, ValueError: as ``perplexity``; or a count below 1.
    """
    for name, count in (("prefill", prefill), ("decode", decode), ("repeats", repeats)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    ids = _token_vector(model, token_ids)
    if ids.numel() < prefill:
        raise ValueError(f"prefill needs {prefill} tokens, got {ids.numel()}")
    prefills, decodes = [], []
    with _inference(model) as device:
        prompt = ids[:prefill].to(device)[None]
        for done in range(warmup + repeats):
            read, generated = _generate_once(model, prompt, decode)
            if done >= warmup:
                prefills.append(prefill / read)
                decodes.append(decode / generated)
            if on_repeat:
                on_repeat(done + 1, warmup + repeats)
    return Throughput(
        statistics.median(prefills),
        statistics.median(decodes),
        tuple(prefills),
        tuple(decodes),
        prefill,
        decode,
    )


def model_size(model: nn.Module) -> int:
    """Bytes the parameters and buffers occupy, each storage counted once.

    Tied weights share a storage and count once, and a view counts with all of what it keeps alive.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        key = storage.data_ptr() or id(tensor)  # meta and empty tensors have no address
        storages[tensor.device, key] = storage.nbytes()
    return sum(storages.values())


def _generate_once(model: nn.Module, prompt: Tensor, decode: int) -> tuple[float, float]:
    """Seconds for the prompt, seconds for ``decode`` tokens after it."""
    start = _now(prompt.device)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    read = _now(prompt.device)
    for _ in range(decode):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return read - start, _now(prompt.device) - read


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _inference(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients, and the device that inputs belong on."""
    with evaluation_mode(model), torch.inference_mode():
        yield next((p.device for p in model.parameters()), torch.device("cpu"))


def _token_vector(model: nn.Module, token_ids: Tensor | Sequence[int]) -> Tensor:
    ids = torch.as_tensor(token_ids)
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(
            f"token_ids must be a vector of integers, got shape {tuple(ids.shape)} and {ids.dtype}"
        )
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is not None and ids.numel() and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(
            f"token_ids lie in {int(ids.min())}…{int(ids.max())}, but the model's vocabulary has "
            f"{vocabulary} entries; was another model's tokenizer used?"
        )
    return ids.long()


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    assert isinstance(logits, Tensor)
    return logits


def _mean_nll(logits: Tensor, window: Tensor) -> float:
    """Mean of −log softmax(logits)[next token], in float32 whatever the logits are in."""
    total = 0.0
    for rows, targets in zip(
        logits[:-1].split(_LOGIT_ROWS), window[1:].split(_LOGIT_ROWS), strict=True
    ):
        total += nn.functional.cross_entropy(rows.float(), targets, reduction="sum").item()
    return total / (window.numel() - 1)


def _exp(nats: float) -> float:
    """exp, with infinity instead of an exception above float64's range."""
    return math.exp(nats) if nats < 709 else math.inf if nats == nats else math.nan
