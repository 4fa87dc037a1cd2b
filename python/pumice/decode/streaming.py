"""Text without end in constant memory: StreamingLLM (Xiao, Tian, Chen, Han and Lewis, "Efficient
Streaming Language Models with Attention Sinks", 2023, arXiv:2309.17453).

A model of rotary embeddings is given, instead of all keys, the first ``sinks`` tokens and the last
``window``. Without the first ones it breaks down as soon as they fall out of the window: trained
models use them to put attention that has nowhere to go. And positions are counted *in the cache*:
with 4 sinks and a window of 1020 no query ever stands beyond position 1023, and the model is always
in a text of 1024 tokens, of which those in the middle are exchanged.

The paper keeps keys unrotated and turns all of them by their place in the cache at every step. But
a score depends only on the difference of two positions. Among the last tokens differences are the
same in the text as in the cache; only between a query and the sinks they are not. So here keys are
turned once, by their position in the text, and a query, from the moment the cache is full, twice,
for two attentions that are merged::

    p                       position of the query in the text
    c = sinks + window − 1  its place in the cache
    out = merge( attention(turn(q, c), sink keys),  attention(turn(q, p), last keys) )

The angles of p are formed in float64, whatever p. Blocks are a ring: a token's slot is that of the
token ``window`` and a bit before it. Memory is fixed, and time per token does not grow.

**Layers with a window of their own** (Mistral, Gemma 2 and 3, gpt-oss) keep it, counted in the
cache as all positions are: what is W or more places before a query it does not see. Of W = 128 in a
cache of 4 + 1020 that leaves the last 128 tokens and no sinks, which is what the layer sees in any
text; with W of at least sinks + window the layer is one like others. So as long as the cache is not
full all layers see exactly what they see in an ordinary pass.

**Learned sinks** (gpt-oss) are a term of the softmax's sum, without a value: they go into one of
the two attentions, so the merged sum has them once.

**Frequencies that depend on the length of the text** (dynamic NTK, longrope) are those of a text of
sinks + window tokens, from the first token on: the logits of the first sinks + window tokens are
those of one ordinary pass over them. No key ever needs another turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pumice.decode.batch import PagedBatch
from pumice.decode.model import PagedModel
from pumice.decode.pool import CachePool
from pumice.decode.request import SamplingParams
from pumice.decode.rotary import Rotary, find_rotary
from pumice.ops.attention import merge_attention
from pumice.ops.paged import cache_append, paged_attention
from pumice.ops.sampling import sample

__all__ = ["StreamingModel"]


class StreamingModel:
    """One endless stream of tokens through a model::

        stream = StreamingModel(model, sinks=4, window=1020)
        logits = stream.forward(tokens)                # any number of them, at any time
        for token in stream.generate(prompt):          # for ever
            ...

    Token by token or in chunks, the result is the same: each query sees the ``sinks`` and the last
    ``window`` tokens, itself included. (The authors' program keeps ``recent_size`` tokens besides
    the query's own: ``window = recent_size + 1``.)

    Args:
        model: of transformers, or with ``forward_paged`` (:mod:`pumice.decode.model`), with rotary
            embeddings. It is given position 0 for all tokens, that is, unrotated queries and keys
            come out, and is itself unchanged.
        sinks: first tokens that stay, 4 in the paper; 0 for plain windowed attention, which fails.
        window: last tokens, at least 1. sinks + window should not exceed the trained context.
        chunk: tokens a forward pass at most; longer input is cut. The ring is longer by so many.
        block_size, cache_dtype: of the :class:`~pumice.decode.CachePool`.

    Attributes:
        length: tokens so far. pool: the memory, of constant size.

    Raises:
        NotImplementedError: other position encodings.
        ValueError: sizes out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sinks: int = 4,
        window: int = 1020,
        chunk: int = 256,
        block_size: int = 16,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        for name, size, least in (("sinks", sinks, 0), ("window", window, 1), ("chunk", chunk, 1)):
            if size < least:
                raise ValueError(f"StreamingModel: {name} must be at least {least}, not {size}")
        self.sinks = sinks
        self.window = window
        self.chunk = chunk
        self.length = 0
        self._model = PagedModel(model)
        self._rotary = find_rotary(self._model, sinks + window)
        self._sink_blocks = -(-sinks // block_size)
        # What a chunk's first query sees, the chunk, and a block begun on either side.
        self._ring_blocks = (window + chunk - 2) // block_size + 2
        self.pool = CachePool.for_model(
            self._model,
            num_blocks=self._sink_blocks + self._ring_blocks,
            block_size=block_size,
            cache_dtype=cache_dtype,
        )

    @property
    def vocab_size(self) -> int:
        return self._model.geometry.vocab_size

    def reset(self) -> None:
        """Begin another stream."""
        self.length = 0

    def forward(self, tokens: Sequence[int] | Tensor, *, last: bool = False) -> Tensor:
        """Logits [n, V] of the stream's next n tokens, or with ``last`` [1, V] of the last.

        An error leaves the stream as it was after the last chunk that succeeded.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64, device=self.pool.device)
        if ids.dim() != 1 or not len(ids):
            raise ValueError(
                f"StreamingModel.forward: tokens must be one or more, [n], not {list(ids.shape)}"
            )
        parts = []
        while len(ids):
            size = min(self.chunk, len(ids))
            if self.length < self.sinks + self.window:  # what fills the cache: a pass of its own
                size = min(size, self.sinks + self.window - self.length)
            rows = None
            if last:
                end = [size - 1] if size == len(ids) else []
                rows = torch.tensor(end, dtype=torch.int64, device=ids.device)
            parts.append(self._model.forward(self._batch(ids[:size]), rows))
            self.length += size
            ids = ids[size:]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def generate(
        self, prompt: Sequence[int] | Tensor, params: SamplingParams | None = None
    ) -> Iterator[int]:
        """Read a prompt, then give one token after the other, without end.

        Every token that was given is part of the stream when the next one is asked for; a prompt of
        another turn may follow in another call.

        Args:
            prompt: one or more tokens, which continue the stream.
            params: temperature, top_k, top_p, min_p and seed count; stopping is up to the caller.
        """
        params = params or SamplingParams()
        seed = torch.tensor([params.seed or 0], device=self.pool.device)
        following: Sequence[int] | Tensor = prompt
        while True:
            logits = self.forward(following, last=True)
            tokens, _ = sample(
                logits,
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
                seeds=seed,
                positions=torch.tensor([self.length], device=self.pool.device),
            )
            token = int(tokens)
            yield token
            following = [token]

    def _batch(self, ids: Tensor) -> _StreamBatch:
        """The next tokens: either some that the cache has room for, or some after them."""
        device, size, start = ids.device, len(ids), self.length
        block_size, end = self.pool.block_size, start + size
        positions = torch.arange(start, end, device=device)
        full = start >= self.sinks + self.window
        first = (start - self.window + 1) // block_size if full else 0
        blocks = torch.arange(first, (end - 1) // block_size + 1, device=device)
        # The sinks' blocks stay; those after them are a ring.
        ring = self._sink_blocks + (blocks - self._sink_blocks) % self._ring_blocks
        table = torch.where(blocks < self._sink_blocks, blocks, ring)
        length, sink_length, sink_table = (
            torch.tensor(numbers, dtype=torch.int32, device=device)
            for numbers in ([end - first * block_size], [self.sinks], [[*range(self._sink_blocks)]])
        )
        return _StreamBatch(
            input_ids=ids,
            positions=torch.zeros_like(positions),
            slot_mapping=table[positions // block_size - first] * block_size
            + positions % block_size,
            block_table=table[None].int(),
            seq_lens=length,
            cu_seqlens_q=torch.tensor([0, size], dtype=torch.int32, device=device),
            max_seqlen_q=size,
            pool=self.pool,
            rotary=self._rotary,
            turns=_Turns(positions),
            cache_turns=_Turns(torch.full_like(positions, self.sinks + self.window - 1)),
            full=full,
            num_sinks=self.sinks,
            window_left=self.window - 1,
            sink_table=sink_table,
            sink_lens=sink_length,
        )


class _Turns:
    """The angles of some tokens, made once for all layers of one rotary embedding."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions
        self._made: list[tuple[Rotary, tuple[Tensor, Tensor]]] = []

    def of(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        for made_for, angles in self._made:
            if made_for is rotary:
                return angles
        self._made.append((rotary, rotary.angles(self.positions)))
        return self._made[-1][1]


@dataclass
class _StreamBatch(PagedBatch):
    """Some tokens of a stream. Queries and keys come unrotated; ``positions`` are all 0."""

    rotary: list[Rotary | None] = field(kw_only=True)
    turns: _Turns = field(kw_only=True)  # positions in the text
    cache_turns: _Turns = field(kw_only=True)  # places in the cache, once it is full
    full: bool = field(kw_only=True)
    num_sinks: int = field(kw_only=True)
    window_left: int = field(kw_only=True)
    sink_table: Tensor = field(kw_only=True)
    sink_lens: Tensor = field(kw_only=True)

    def append(self, layer_idx: int, key: Tensor, value: Tensor) -> None:
        rotary = self.rotary[layer_idx]
        turn, interleaved = None, False
        if rotary is not None:
            each = torch.arange(len(key), device=key.device)
            turn, interleaved = (*self.turns.of(rotary), each), rotary.interleaved
        k_scale, v_scale = self.pool.scales(layer_idx)
        cache_append(
            key,
            value,
            self.pool.key_caches[layer_idx],
            self.pool.value_caches[layer_idx],
            self.slot_mapping,
            k_scale=k_scale,
            v_scale=v_scale,
            rotary=turn,
            interleaved=interleaved,
        )

    def attention(
        self,
        layer_idx: int,
        query: Tensor,
        *,
        softmax_scale: float | None,
        window: tuple[int, int],
        sinks: Tensor | None,
        softcap: float,
    ) -> Tensor:
        own = window[0]  # of the layer: how far back it looks, -1 for any distance
        narrow = own if 0 <= own < self.window_left else self.window_left
        recent = self._attend(
            layer_idx, query, self.turns, self.block_table, self.seq_lens, softmax_scale, softcap,
            window=(narrow if self.full else own, -1), sinks=sinks,
        )  # fmt: skip
        # Of the sinks the layer sees those that are near enough to the last place in the cache.
        hidden = max(0, self.num_sinks + self.window_left - own) if own >= 0 else 0
        if not self.full or hidden >= self.num_sinks:
            return recent[0]
        # Learned sinks are one more term of the softmax: of one part, not of both.
        first = self._attend(
            layer_idx, query, self.cache_turns, self.sink_table, self.sink_lens, softmax_scale,
            softcap, causal=False, hidden=hidden,
        )  # fmt: skip
        outs = torch.stack([recent[0], first[0]])[:, None]
        lses = torch.stack([recent[1], first[1]])[:, None]
        return merge_attention(outs, lses)[0][0]

    def _attend(
        self,
        layer_idx: int,
        query: Tensor,
        turns: _Turns,
        table: Tensor,
        lengths: Tensor,
        softmax_scale: float | None,
        softcap: float,
        *,
        causal: bool = True,
        window: tuple[int, int] = (-1, -1),
        sinks: Tensor | None = None,
        hidden: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of the queries, turned, over one part of the cache but its first tokens."""
        rotary = self.rotary[layer_idx]
        cu_seqlens, most = self.cu_seqlens_q, self.max_seqlen_q
        if hidden:
            # The same keys for every query: a window says so only to each as a sequence of its own.
            cu_seqlens = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
            most = 1
            table, lengths = table.repeat(len(query), 1), lengths.repeat(len(query))
            window = (self.num_sinks - 1 - hidden, -1)
        k_scale, v_scale = self.pool.scales(layer_idx)
        return paged_attention(
            query if rotary is None else rotary.rotate(query, turns.of(rotary)),
            self.pool.key_caches[layer_idx],
            self.pool.value_caches[layer_idx],
            table,
            lengths,
            cu_seqlens_q=cu_seqlens,
            max_seqlen_q=most,
            softmax_scale=softmax_scale,
            causal=causal,
            window=window,
            sinks=sinks,
            softcap=softcap,
            k_scale=k_scale,
            v_scale=v_scale,
            return_lse=True,
        )
