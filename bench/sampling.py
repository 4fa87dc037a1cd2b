"""Tokens from logits, and verified drafts: ``python -m bench sampling``.

Beside what one writes in torch: divide, sort, softmax, running sum, mask, multinomial (for top_k
alone topk instead of the sort, greedy argmax); for verification gather, compare, residual,
multinomial. Logits fall like Zipf's law, as those of language models do; "flat" ones are normal.
Floor: logits, or the two rows of probabilities that a rejection needs, read once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.cases import BASELINE, Bench, Peer
from bench.machine import Machine
from bench.timing import Contender, copies_beyond_cache


@dataclass(frozen=True)
class Sampling:
    """R rows of V logits, or as many sequences of drafts."""

    rows: int
    vocab: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    flat: bool = False
    drafts: int = 0  # above 0: verification of so many

    def __str__(self) -> str:
        words = [f"R={self.rows} V={self.vocab}"]
        if self.drafts:
            words.append(f"verify {self.drafts} drafts")
        elif self.temperature == 0:
            words.append("greedy")
        elif self.top_k or self.top_p < 1:
            words += [f"top_k={self.top_k}"] if self.top_k else []
            words += [f"top_p={self.top_p}"] if self.top_p < 1 else []
        else:
            words.append("plain")
        return " ".join(words + ["flat"] * self.flat)

    @property
    def operations(self) -> int:
        return self.rows * self.vocab


@dataclass
class Inputs:
    case: Sampling
    logits: list[Tensor]  # [R, V] each
    uniforms: Tensor
    draft_tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    draft_probs: list[Tensor] = field(default_factory=list)  # [R, N, V] each
    target_probs: list[Tensor] = field(default_factory=list)  # [R, N + 1, V] each


def moved_bytes(case: Sampling, dtype: torch.dtype) -> int:
    row = case.vocab * (2 * 4 if case.drafts else dtype.itemsize)
    return case.rows * row


def make_inputs(
    case: Sampling, machine: Machine, device: torch.device, dtype: torch.dtype
) -> Inputs:
    g = torch.Generator().manual_seed(0)
    copies = min(copies_beyond_cache(moved_bytes(case, dtype), machine.cache_bytes), 8)

    def logits() -> Tensor:
        x = torch.randn(case.rows, case.vocab, generator=g)
        if case.flat:
            return x * 2
        zipf = -1.3 * torch.arange(1, case.vocab + 1).log()
        return zipf[torch.argsort(torch.rand(case.rows, case.vocab, generator=g))] + x / 2

    inputs = Inputs(case, [], torch.rand(case.rows, case.drafts + 1, generator=g).to(device))
    if not case.drafts:
        inputs.uniforms = inputs.uniforms[:, 0].contiguous()
        inputs.logits = [logits().to(device, dtype) for _ in range(copies)]
        return inputs
    copies = min(copies, 2)  # N + 1 rows each, most of them never read
    for _ in range(copies):
        target = torch.stack([logits().softmax(-1) for _ in range(case.drafts + 1)], 1)
        near = torch.rand(case.rows, case.drafts, case.vocab, generator=g) * target[:, :-1]
        inputs.target_probs.append(target.to(device))
        inputs.draft_probs.append((near / near.sum(-1, keepdim=True)).to(device))
    flat = inputs.draft_probs[0].flatten(0, 1).cpu()
    drawn = torch.multinomial(flat, 1, generator=g)
    inputs.draft_tokens = drawn.view(case.rows, case.drafts).to(device)
    return inputs


def torch_sample(case: Sampling, logits: Tensor) -> Tensor:
    if case.temperature == 0:
        return logits.argmax(-1)
    x = logits.float() / case.temperature
    if case.top_p < 1:
        values, order = x.sort(-1, descending=True)
        if case.top_k:
            values[:, case.top_k :] = -torch.inf
        probs = values.softmax(-1)
        probs[probs.cumsum(-1) - probs >= case.top_p] = 0
        return order.gather(-1, probs.multinomial(1))[:, 0]
    if case.top_k:
        values, order = x.topk(case.top_k, -1)
        return order.gather(-1, values.softmax(-1).multinomial(1))[:, 0]
    return x.softmax(-1).multinomial(1)[:, 0]


def torch_verify(inputs: Inputs, i: int) -> tuple[Tensor, Tensor]:
    target, draft = inputs.target_probs[i], inputs.draft_probs[i]
    tokens = inputs.draft_tokens
    drafts = tokens.shape[1]
    p = target[:, :-1].gather(-1, tokens[..., None])[..., 0]
    q = draft.gather(-1, tokens[..., None])[..., 0]
    accepted = (inputs.uniforms[:, :-1] * q < p).long().cumprod(-1).sum(-1)
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    rest = draft[rows, accepted.clamp(max=drafts - 1)] * (accepted < drafts)[:, None]
    left = (target[rows, accepted] - rest).clamp(min=0)
    last = (left / left.sum(-1, keepdim=True)).multinomial(1)
    out = torch.nn.functional.pad(tokens, (0, 1), value=-1)
    places = torch.arange(drafts + 1, device=tokens.device)
    out = out.masked_fill(places > accepted[:, None], -1)
    return out.scatter(1, accepted[:, None], last), accepted


def with_torch(inputs: Inputs) -> Contender:
    def call(i: int) -> object:
        if inputs.case.drafts:
            return torch_verify(inputs, i % len(inputs.target_probs))
        return torch_sample(inputs.case, inputs.logits[i % len(inputs.logits)])

    return call


def with_pumice(inputs: Inputs) -> Contender:
    from pumice.ops import sample, speculative_verify

    case = inputs.case
    device = inputs.uniforms.device

    def parameter(value: float, off: float, dtype: torch.dtype) -> Tensor | None:
        return None if value == off else torch.full((1,), value, dtype=dtype, device=device)

    temperature = parameter(case.temperature, 1.0, torch.float32)
    top_k = parameter(case.top_k, 0, torch.int32)
    top_p = parameter(case.top_p, 1.0, torch.float32)

    def call(i: int) -> object:
        if case.drafts:
            i %= len(inputs.target_probs)
            return speculative_verify(
                inputs.draft_tokens,
                inputs.target_probs[i],
                draft_probs=inputs.draft_probs[i],
                uniforms=inputs.uniforms,
            )
        return sample(
            inputs.logits[i % len(inputs.logits)],
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            uniforms=inputs.uniforms,
        )

    return call


PEERS: dict[str, Peer[Inputs]] = {BASELINE: with_torch, "pumice": with_pumice}


def floor_us(case: Sampling, machine: Machine, dtype: torch.dtype) -> float:
    return moved_bytes(case, dtype) / machine.bandwidth * 1e6


BENCH = Bench(
    "sampling", make_inputs, PEERS, floor_us, kernel_names=("sampling", "speculative_verify")
)


def variants(rows: int, vocab: int) -> list[Sampling]:
    return [
        Sampling(rows, vocab, temperature=0.0),
        Sampling(rows, vocab),
        Sampling(rows, vocab, top_k=50),
        Sampling(rows, vocab, top_p=0.9),
        Sampling(rows, vocab, top_p=0.9, flat=True),
        Sampling(rows, vocab, temperature=0.8, top_k=50, top_p=0.9),
    ]


def cpu_cases() -> list[Sampling]:
    sizes = ((1, 32000), (1, 151936), (8, 49152), (64, 49152))
    sampled = [case for rows, vocab in sizes for case in variants(rows, vocab)]
    return [*sampled, Sampling(1, 151936, drafts=4), Sampling(16, 49152, drafts=4)]


def cuda_cases() -> list[Sampling]:
    sizes = [(rows, vocab) for vocab in (32000, 128256, 151936) for rows in (1, 16, 64, 256)]
    sampled = [case for rows, vocab in sizes for case in variants(rows, vocab)]
    return [*sampled, *(Sampling(rows, 151936, drafts=4) for rows in (1, 16, 64))]


CASES = {"cpu": cpu_cases, "cuda": cuda_cases}
