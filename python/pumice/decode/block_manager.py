"""Which block of the paged KV cache holds which tokens of which sequence.

The cache of a layer is ``[num_blocks, block_size, H_kv, D]``. A sequence owns no stretch of it but
a list of blocks, its *block table*: token ``i`` lies in *slot* ``table[i // block_size] *
block_size + i % block_size``. So memory is handed out a block at a time, as sequences grow, and
less than one block a sequence is ever empty (PagedAttention, Kwon et al., 2023, arXiv:2309.06180).
Two sequences with a common beginning can refer to the same blocks.

:class:`BlockManager` keeps the tables and the reference counts. It never touches the cache: its
answers are arguments of ``cache_copy_blocks``, ``cache_append`` and ``paged_attention``. A step of
a server that decodes one token for each of n sequences is::

    step = manager.append(ids, tokens)             # may raise OutOfBlocksError, changing nothing
    cache_copy_blocks(key_cache, value_cache, step.copies)
    for each layer:
        cache_append(key, value, key_cache, value_cache, step.slot_mapping)
        paged_attention(query, key_cache, value_cache, step.block_table, step.seq_lens)
    manager.commit(ids)                            # what was appended is computed now
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pumice import _C
from pumice._C import DoubleFreeError, OutOfBlocksError, UnknownSequenceError

__all__ = [
    "Allocation",
    "BlockManager",
    "DoubleFreeError",
    "OutOfBlocksError",
    "Stats",
    "Step",
    "UnknownSequenceError",
]


class Allocation(NamedTuple):
    """A new sequence.

    ``id`` names it in every later call and is never given out again. ``num_tokens`` tokens have
    slots, of which the first ``cached_tokens`` need not be computed: the keys and values of equal
    tokens are there. ``slot_mapping``, int64, is for those between.
    """

    id: int
    num_tokens: int
    cached_tokens: int
    slot_mapping: npt.NDArray[np.int64]


class Step(NamedTuple):
    """What the kernels need for one forward pass over n sequences.

    ``slot_mapping``: int64, where the new tokens' keys and values go, sequence after sequence.
    ``block_table``: int32 ``[n, width]``, rows padded with ``null_block``.
    ``seq_lens``: int32 ``[n]``, lengths that include the new tokens.
    ``copies``: int64 ``[m, 2]``, blocks to copy, (from, to), before anything is written; a block
    that is copied to is never copied from in the same step, so their order does not matter.
    """

    slot_mapping: npt.NDArray[np.int64]
    block_table: npt.NDArray[np.int32]
    seq_lens: npt.NDArray[np.int32]
    copies: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stats:
    """The account of the pool. ``num_blocks = free + cached + used`` always.

    ``free_blocks`` hold nothing; ``cached_blocks`` belong to no sequence, but a prompt may find
    their contents until they are taken for something else; ``used_blocks`` belong to sequences,
    ``shared_blocks`` of them to two or more. ``indexed_blocks`` can be found by a prompt (used or
    cached). ``tokens`` adds up the lengths of all ``sequences``, reclaimed tokens included.
    ``stored_tokens`` counts the slots of used blocks that hold a token of some sequence, shared
    ones once, ``waste`` those that hold none: their sum is ``used_blocks * block_size``.
    Since construction: ``evictions`` of cached blocks, and of ``prompt_tokens`` asked for,
    ``prompt_hits`` found.
    """

    num_blocks: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    shared_blocks: int
    indexed_blocks: int
    sequences: int
    tokens: int
    stored_tokens: int
    waste: int
    evictions: int
    prompt_tokens: int
    prompt_hits: int

    @property
    def utilisation(self) -> float:
        """The part of the slots of used blocks that hold a token; 1 where none is used."""
        slots = self.stored_tokens + self.waste
        return self.stored_tokens / slots if slots else 1.0


class BlockManager:
    """The bookkeeping of a paged KV cache of ``num_blocks`` blocks of ``block_size`` tokens.

    ``prefix_caching``: full blocks whose tokens are committed are found again by prompts that
    begin with the same tokens, and outlive their sequences until their memory is needed; then the
    one least recently used goes first, and never before a block that continues it. Blocks are
    looked up by a chained hash and compared by the tokens themselves: a hash collision costs time,
    never a wrong hit.

    ``watermark``: the part of the blocks (rounded down) that :meth:`allocate` leaves available,
    so that sequences that run already can grow. :meth:`append` may use it.

    ``window_left`` and ``sink_tokens``: the mask of the model, as :mod:`pumice.ops` has it: a
    query at position p sees keys ``j >= p - window_left`` and ``j < sink_tokens``. Blocks that no
    later query will see are given back when the sequence grows; their place in the table holds
    ``null_block``, and positions keep counting. Leave ``window_left`` None where any layer of the
    model sees everything.

    ``null_block``: what pads tables: -1, or a block of the pool, which is then never handed out,
    for kernels that read the padding (without using what they find there).

    Every method happens wholly or raises and changes nothing; all may be called from several
    threads, and release the interpreter's lock. Ids, counts, lengths and tokens are integer arrays
    or lists; scalars where one suffices.

    Errors: :class:`OutOfBlocksError` (attributes ``needed``, ``available``),
    :class:`UnknownSequenceError`, :class:`DoubleFreeError`; ValueError for negative or impossible
    sizes and for an id named twice in one call, TypeError for arrays that are not integers.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        prefix_caching: bool = True,
        watermark: float = 0.01,
        window_left: int | None = None,
        sink_tokens: int = 0,
        null_block: int = -1,
        _hash_bits: int = 64,
    ) -> None:
        if window_left is not None and window_left < 0:
            raise ValueError(
                f"BlockManager: window_left must be in [0, 2^29), or None, not {window_left}"
            )
        self.block_size = block_size
        self.null_block = null_block
        self.prefix_caching = prefix_caching
        self.window_left = window_left
        self.sink_tokens = sink_tokens
        self._core = _C.BlockManager(
            num_blocks,
            block_size,
            prefix_caching,
            watermark,
            -1 if window_left is None else window_left,
            sink_tokens,
            null_block,
            _hash_bits,
        )
        self.num_blocks = self._core.usable_blocks()
        self.watermark_blocks = self._core.watermark_blocks()

    # Sequences come and go.

    def allocate(
        self,
        tokens: npt.ArrayLike | None = None,
        *,
        num_tokens: int | None = None,
        extra_key: int = 0,
        limit: int | None = None,
    ) -> Allocation:
        """Start a sequence with the tokens of a prompt.

        Its longest known prefix, in whole blocks and short of the last token (some token must be
        computed for there to be a next one), is shared with whoever has it. Blocks are taken for
        the rest, or with ``limit`` for no more than so many of its tokens: the others follow
        by :meth:`append` (chunked prefill).

        ``extra_key`` keeps apart what must not be shared though tokens are equal: adapters,
        tenants, images. ``num_tokens`` in place of tokens: they are unknown, so nothing of this
        sequence is ever found or shared by content.

        Raises :class:`OutOfBlocksError` where fewer than ``watermark_blocks`` would be left.
        """
        return Allocation(
            *self._core.allocate(tokens, _size(tokens, num_tokens, "allocate"), extra_key, limit)
        )

    def can_allocate(
        self,
        tokens: npt.ArrayLike | None = None,
        *,
        num_tokens: int | None = None,
        extra_key: int = 0,
        limit: int | None = None,
    ) -> bool:
        """Whether :meth:`allocate` would succeed now."""
        size = _size(tokens, num_tokens, "can_allocate")
        return self._core.can_allocate(tokens, size, extra_key, limit)

    def match_prefix(self, tokens: npt.ArrayLike, *, extra_key: int = 0) -> int:
        """How many tokens of this prompt :meth:`allocate` would find cached."""
        return self._core.match_prefix(tokens, extra_key)

    def fork(self, parents: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """A copy of each sequence; the new ids. A parent may be named several times.

        Parent and child share every block, also the last, partly filled one. Who first appends to
        a shared block gets a copy of it (``Step.copies``), the last to refer to it writes in place.
        """
        return self._core.fork(parents)

    def free(self, ids: npt.ArrayLike) -> None:
        """End sequences. Their blocks are free, or cached where a prompt may find them."""
        self._core.free(ids)

    # Sequences grow and shrink.

    def append(
        self,
        ids: npt.ArrayLike,
        tokens: npt.ArrayLike | None = None,
        counts: npt.ArrayLike | None = None,
        *,
        width: int | None = None,
    ) -> Step:
        """Append ``counts[i]`` tokens, or one, to each sequence; what the kernels need for it.

        ``tokens`` holds them sequence after sequence. They may be left out without prefix
        caching, and for sequences whose tokens are unknown. ``width`` is that of the block table
        (for kernels captured with one); by default that of its longest row.

        Blocks out of the window are given back first, so the new tokens may take their place:
        cached keys must be written in the order of the calls.

        Raises :class:`OutOfBlocksError` where the pool has too few for all of them.
        """
        return Step(*self._core.append(ids, tokens, counts, width))

    def can_append(self, ids: npt.ArrayLike, counts: npt.ArrayLike | None = None) -> bool:
        """Whether :meth:`append` would succeed now."""
        return self._core.can_append(ids, counts)

    def view(
        self,
        ids: npt.ArrayLike,
        counts: npt.ArrayLike | None = None,
        *,
        width: int | None = None,
    ) -> Step:
        """The :class:`Step` for the last ``counts[i]`` tokens, or one, of each sequence.

        Nothing changes and ``copies`` is empty: for a batch put together from several calls, such
        as new prompts and running sequences.
        """
        return Step(*self._core.view(ids, counts, width))

    def commit(self, ids: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> None:
        """Declare the first ``lengths[i]`` tokens, or all, computed: their blocks can be found.

        To be called after the forward pass that wrote their keys and values. Until then no prompt
        finds them. Never takes back what was committed. (Before that pass it may be called where
        whoever finds them takes part in the same pass, and :meth:`clear_cache` follows if it
        fails.)
        """
        self._core.commit(ids, lengths)

    def truncate(self, ids: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Cut sequences to ``lengths[i]`` tokens, as after rejected drafts.

        Raises ValueError where the next token would see blocks that left the window.
        """
        self._core.truncate(ids, lengths)

    def clear_cache(self) -> None:
        """Forget every known prefix, as after a change of the weights. Sequences stay."""
        self._core.clear_cache()

    # The account.

    def stats(self) -> Stats:
        """The exact account of the pool; takes time in the number of sequences."""
        return Stats(**self._core.stats())

    @property
    def available_blocks(self) -> int:
        """Blocks that can be taken: free ones and cached ones."""
        return self._core.available_blocks()

    def num_tokens(self, id: int) -> int:
        """The length of a sequence."""
        return self._core.num_tokens(id)

    def block_table(self, id: int) -> npt.NDArray[np.int32]:
        """The blocks of a sequence, ``null_block`` where one was reclaimed."""
        return self._core.block_table(id)

    def ref_count(self, block: int) -> int:
        """How many sequences refer to a block."""
        return self._core.ref_count(block)

    def block_tokens(self, block: int) -> npt.NDArray[np.int32]:
        """The tokens whose keys and values lie in a block's slots, by the calls so far.

        -1: unknown. Slots that no sequence has filled hold anything.
        """
        return self._core.block_tokens(block)


def _size(tokens: npt.ArrayLike | None, num_tokens: int | None, operation: str) -> int:
    if (tokens is None) == (num_tokens is None):
        raise ValueError(f"{operation}: give either tokens or num_tokens")
    return num_tokens if num_tokens is not None else 0
