"""A draft model over a paged cache of its own, which follows what the target decides.

What the target accepted of the last drafts is in this cache already; what it rejected is cut off,
and what it added is caught up with in the pass that makes the first new draft. The cache may be too
small for everybody: then a request has to do without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pumice.decode.batch import PagedBatch
from pumice.decode.block_manager import BlockManager, OutOfBlocksError
from pumice.decode.draft import DraftRequest
from pumice.decode.runner import ModelRunner

__all__ = ["CachedSequence", "DraftCache", "Row"]


@dataclass
class CachedSequence:
    """What the cache holds of a request: its first ``known`` tokens, then ``guessed``.

    ``id`` is the block manager's, ``seed`` that of the draft's own draws.
    """

    id: int
    seed: int
    known: int = 0
    guessed: list[int] = field(default_factory=list)


@dataclass
class Row:
    """A request that gets drafts: the ``index``-th of the call, at most ``limit`` of them."""

    index: int
    request: DraftRequest
    sequence: CachedSequence
    limit: int


class DraftCache:
    """Runs a draft model on requests; see :class:`~pumice.decode.ModelDraft` for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        *,
        num_blocks: int = 1024,
        block_size: int = 16,
        cache_dtype: torch.dtype | None = None,
        max_batch_tokens: int = 2048,
        prefix_cache: bool = True,
    ) -> None:
        if max_batch_tokens < 1:
            raise ValueError(
                f"DraftCache: max_batch_tokens must be at least 1, not {max_batch_tokens}"
            )
        self.runner = ModelRunner(
            model, num_blocks=num_blocks, block_size=block_size, cache_dtype=cache_dtype
        )
        self.max_batch_tokens = max_batch_tokens
        # All tokens are kept, also those that left the model's window: where drafts are rejected
        # the window moves back, and sees them again.
        self.manager = BlockManager(num_blocks, block_size, prefix_caching=prefix_cache)
        self._sequences: dict[int, CachedSequence] = {}

    def admit(self, requests: Sequence[DraftRequest], limits: Sequence[int]) -> list[Row]:
        """The requests whose tokens and drafts fit; what the target rejected of them is cut off.

        Those that have a sequence come first: newcomers must not push them out.
        """
        order = sorted(range(len(requests)), key=lambda i: requests[i].id not in self._sequences)
        rows: list[Row] = []
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
                rows.append(Row(index, request, sequence, limit))
                ids.append(sequence.id)
                growth.append(more)
            else:
                self.release(request.id)
        return rows

    def _resume(self, request: DraftRequest) -> CachedSequence:
        sequence = self._sequences.get(request.id)
        if sequence is None:
            # Only what is found cached: the others follow by append, in as many passes as needed.
            new = self.manager.allocate(list(request.tokens), limit=0)
            sequence = CachedSequence(new.id, _own_seed(request), known=new.cached_tokens)
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

    def catch_up(self, rows: Sequence[Row]) -> Tensor:
        """Run what the cache lacks of each request's tokens: [rows, V], the logits of the last."""
        logits: dict[int, Tensor] = {}
        waiting = list(range(len(rows)))
        while waiting:
            room = self.max_batch_tokens
            chunks: dict[int, list[int]] = {}
            for i in waiting:
                known = rows[i].sequence.known
                chunks[i] = list(rows[i].request.tokens[known : known + room])
                room -= len(chunks[i])
                if room == 0:
                    break
            last = self.forward([rows[i].sequence.id for i in chunks], list(chunks.values()))
            for (i, chunk), row_logits in zip(chunks.items(), last, strict=True):
                rows[i].sequence.known += len(chunk)
                if rows[i].sequence.known == len(rows[i].request.tokens):
                    logits[i] = row_logits
                    waiting.remove(i)
        if rows:  # what is decided stays true, whatever becomes of the drafts
            lengths = [len(row.request.tokens) for row in rows]
            self.manager.commit([row.sequence.id for row in rows], lengths)
        return torch.stack([logits[i] for i in range(len(rows))])

    def guess(self, rows: Sequence[Row], tokens: Sequence[int]) -> Tensor:
        """Append a guessed token to each row and run it: logits [rows, V]."""
        logits = self.forward([row.sequence.id for row in rows], [[token] for token in tokens])
        for row, token in zip(rows, tokens, strict=True):
            row.sequence.guessed.append(token)
        return logits

    def forward(self, ids: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to sequences of the block manager and run them: logits of each last one."""
        flat = [token for one in tokens for token in one]
        step = self.manager.append(ids, flat, [len(one) for one in tokens])
        batch = PagedBatch.from_step(self.runner.pool, step, tokens)
        return self.runner.forward(batch, batch.cu_seqlens_q[1:].long() - 1)

    def release(self, id: int) -> None:
        """Give back the blocks of a request, if it has any."""
        sequence = self._sequences.pop(id, None)
        if sequence is not None:
            self.manager.free([sequence.id])


def _own_seed(request: DraftRequest) -> int:
    """The seed of the draft's draws: with the target's own, a token would be drawn and judged by
    one and the same number."""
    seed = request.seed if request.seed is not None else request.params.seed
    return int(torch.randint(2**62, ())) if seed is None else mix(seed)


def mix(number: int) -> int:
    """Another number in [0, 2^63), as good as independent: SplitMix64 (Steele et al., 2014)."""
    mask = (1 << 64) - 1
    z = (number + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
