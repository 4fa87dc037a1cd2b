"""Drafts by a second, cheaper model with the target's vocabulary.

It decodes ahead one token at a time, over a paged cache of its own. What the target accepted of its
last drafts is in that cache already; what was rejected is cut off, and what the target added is
caught up with in the same pass that makes the first new draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pumice.decode.batch import PagedBatch
from pumice.decode.block_manager import BlockManager, OutOfBlocksError
from pumice.decode.draft import DraftRequest, Proposal
from pumice.decode.gamma import AdaptiveGamma, PacedDraft
from pumice.decode.runner import ModelRunner
from pumice.ops.sampling import sampling_probs, speculative_verify

__all__ = ["ModelDraft"]


@dataclass
class _Sequence:
    """What the draft's cache holds of a request: its first ``known`` tokens, then ``guessed``."""

    id: int
    seed: int
    known: int = 0
    guessed: list[int] = field(default_factory=list)


@dataclass
class _Row:
    """A request that gets drafts in this call."""

    index: int  # of the request in the call
    request: DraftRequest
    sequence: _Sequence
    limit: int
    drafts: list[int] = field(default_factory=list)


class ModelDraft(PacedDraft):
    """Any causal language model with the target's vocabulary as a draft.

    Tokens are drawn from its distribution, filtered as the request's own are (temperature, top-k,
    top-p, min-p): the closer p and q are, the more is kept. Where all requests are greedy, so is
    the draft, and it makes no probabilities.

    Args:
        model: what :class:`~pumice.decode.ModelRunner` takes, on the target's device.
        gamma: tokens to draft at a time, or an :class:`~pumice.decode.AdaptiveGamma`.
        num_blocks, block_size, cache_dtype: of the draft's own cache. A request that finds no room
            in it gets no drafts, and decodes as it would without.
        max_batch_tokens: of one forward pass; longer prompts are caught up with in several.
        prefix_cache: find prompts' common beginnings, as the engine does.
    """

    def __init__(
        self,
        model: nn.Module,
        gamma: int | AdaptiveGamma = 4,
        *,
        num_blocks: int = 1024,
        block_size: int = 16,
        cache_dtype: torch.dtype | None = None,
        max_batch_tokens: int = 2048,
        prefix_cache: bool = True,
    ) -> None:
        super().__init__(gamma)
        if max_batch_tokens < 1:
            raise ValueError(
                f"{type(self).__name__}: max_batch_tokens must be at least 1, not "
                f"{max_batch_tokens}"
            )
        self.runner = ModelRunner(
            model, num_blocks=num_blocks, block_size=block_size, cache_dtype=cache_dtype
        )
        self.vocab_size = self.runner.vocab_size
        self.max_batch_tokens = max_batch_tokens
        # All tokens are kept, also those that left the model's window: where drafts are rejected the
        # window moves back, and sees them again.
        self.manager = BlockManager(num_blocks, block_size, prefix_caching=prefix_cache)
        self._sequences: dict[int, _Sequence] = {}

    def draft(self, requests: Sequence[DraftRequest], limits: Sequence[int]) -> Proposal:
        rows = self._admit(requests, limits)
        width = max((row.limit for row in rows), default=0)
        device = self.runner.device
        tokens = torch.zeros(len(requests), width, dtype=torch.int64, device=device)
        counts = torch.zeros(len(requests), dtype=torch.int32)
        greedy = all(row.request.params.temperature == 0 for row in rows)
        probs = None if greedy else torch.zeros(len(requests), width, self.runner.vocab_size)
        probs = None if probs is None else probs.to(device)
        logits = self._catch_up(rows) if rows else torch.empty(0)
        drawing = rows
        for k in range(width):
            places = torch.tensor([row.index for row in drawing], device=device)
            drawn, q = self._draw(logits, drawing, greedy)
            tokens[places, k] = drawn
            if probs is not None and q is not None:
                probs[places, k] = q
            for row, token in zip(drawing, drawn.tolist(), strict=True):
                row.drafts.append(token)
            drawing = [row for row in drawing if k + 1 < row.limit]
            if drawing:
                logits = self._forward(drawing, [row.drafts[-1:] for row in drawing])
                for row in drawing:
                    row.sequence.guessed.append(row.drafts[-1])
        for row in rows:
            counts[row.index] = len(row.drafts)
        return Proposal(tokens, counts.to(device), probs)

    def release(self, id: int) -> None:
        super().release(id)
        sequence = self._sequences.pop(id, None)
        if sequence is not None:
            self.manager.free([sequence.id])

    def _admit(self, requests: Sequence[DraftRequest], limits: Sequence[int]) -> list[_Row]:
        """The requests whose tokens and drafts fit the cache, theirs cut to what is decided.

        Those that have a sequence come first: newcomers must not push them out.
        """
        order = sorted(range(len(requests)), key=lambda i: requests[i].id not in self._sequences)
        rows: list[_Row] = []
        ids: list[int] = []
        growth: list[int] = []
        for index in order:
            request, limit = requests[index], limits[index]
            if limit == 0 or not request.tokens:
                continue
            try:
                sequence = self._resume(request)
            except OutOfBlocksError:
                continue
            more = len(request.tokens) - sequence.known + limit - 1  # the last draft is not run
            if self.manager.can_append([*ids, sequence.id], [*growth, more]):
                rows.append(_Row(index, request, sequence, limit))
                ids.append(sequence.id)
                growth.append(more)
            else:
                self._evict(request.id)
        return rows

    def _resume(self, request: DraftRequest) -> _Sequence:
        """The sequence of a request, without what the target rejected; a new one if need be."""
        sequence = self._sequences.get(request.id)
        if sequence is None:
            # Only what is found cached: the others follow by append, in as many passes as needed.
            new = self.manager.allocate(list(request.tokens), limit=0)
            seed = request.seed if request.seed is not None else request.params.seed
            if seed is None:
                seed = int(torch.randint(2**62, ()))
            sequence = _Sequence(new.id, _own_seed(seed), known=new.cached_tokens)
            self._sequences[request.id] = sequence
            return sequence
        # The last token is always run: its logits are wanted.
        most = len(request.tokens) - 1
        kept = min(sequence.known, most)
        for guess in sequence.guessed:
            if kept == most or guess != request.tokens[kept]:
                break
            kept += 1
        if self.manager.num_tokens(sequence.id) > kept:
            self.manager.truncate([sequence.id], [kept])
        sequence.known, sequence.guessed = kept, []
        return sequence

    def _evict(self, id: int) -> None:
        self.manager.free([self._sequences.pop(id).id])

    def _catch_up(self, rows: list[_Row]) -> Tensor:
        """Run what the cache lacks of each request's tokens; the logits of their last ones."""
        logits: list[Tensor] = []
        complete: list[int] = []
        waiting = list(range(len(rows)))
        while waiting:
            room = self.max_batch_tokens
            chunks: list[tuple[int, list[int]]] = []
            for i in waiting:
                known = rows[i].sequence.known
                chunk = list(rows[i].request.tokens[known : known + room])
                chunks.append((i, chunk))
                room -= len(chunk)
                if room == 0:
                    break
            now = [rows[i] for i, _ in chunks]
            last = self._forward(now, [chunk for _, chunk in chunks])
            for place, (row, (i, chunk)) in enumerate(zip(now, chunks, strict=True)):
                row.sequence.known += len(chunk)
                if row.sequence.known == len(row.request.tokens):
                    complete.append(i)
                    logits.append(last[place])
                    waiting.remove(i)
        ids = [row.sequence.id for row in rows]
        self.manager.commit(ids, [len(row.request.tokens) for row in rows])
        order = sorted(range(len(rows)), key=complete.__getitem__)
        return torch.stack([logits[place] for place in order])

    def _forward(self, rows: list[_Row], tokens: list[list[int]]) -> Tensor:
        """Append tokens to the rows' sequences and run them: logits of each one's last."""
        ids, counts = [row.sequence.id for row in rows], [len(one) for one in tokens]
        step = self.manager.append(ids, [token for one in tokens for token in one], counts)
        batch = PagedBatch.from_step(self.runner.pool, step, tokens)
        return self.runner.forward(batch, batch.cu_seqlens_q[1:].long() - 1)

    def _draw(self, logits: Tensor, rows: list[_Row], greedy: bool) -> tuple[Tensor, Tensor | None]:
        """A token for each row, and the probabilities that it was drawn from."""
        if greedy:
            return logits.argmax(-1), None
        q = sampling_probs(logits, **_filters(rows, logits.device))
        seeds = [row.sequence.seed for row in rows]
        positions = [len(row.request.tokens) + len(row.drafts) for row in rows]
        # Drawn from q itself: without drafts, verification is sampling.
        drawn, _ = speculative_verify(
            torch.empty(len(rows), 0, dtype=torch.int64, device=logits.device),
            q[:, None],
            seeds=torch.tensor(seeds, device=logits.device),
            positions=torch.tensor(positions, device=logits.device),
        )
        return drawn[:, 0], q


def _filters(rows: list[_Row], device: torch.device) -> dict[str, Any]:
    params = [row.request.params for row in rows]
    return {
        "temperature": torch.tensor([p.temperature for p in params], device=device),
        "top_k": torch.tensor([p.top_k for p in params], dtype=torch.int32, device=device),
        "top_p": torch.tensor([p.top_p for p in params], device=device),
        "min_p": torch.tensor([p.min_p for p in params], device=device),
    }


def _own_seed(seed: int) -> int:
    """Another key for the draft's draws: with the target's, a token would be drawn and judged by
    one and the same number. The finalizer of SplitMix64 (Steele et al., 2014)."""
    mask = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
