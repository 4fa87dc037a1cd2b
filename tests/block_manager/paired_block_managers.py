"""The real and the naive block manager side by side, and a cache that is really written."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from naive_block_manager import LOST, NaiveManager

from pumice.decode import BlockManager, DoubleFreeError, OutOfBlocksError, Step


class PairedManagers:
    """Every operation is done by both, and :meth:`check` compares all there is to see.

    ``cache`` holds what the kernels would have written: the token whose key lies in each slot.
    ``seen`` counts what happened, so that a test can tell that it tested something.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        caching: bool = True,
        watermark: float = 0.0,
        window: int | None = None,
        sinks: int = 0,
        reserve: bool = False,
        hash_bits: int = 64,
    ) -> None:
        self.size = block_size
        self.null = num_blocks - 1 if reserve else -1
        self.real = BlockManager(
            num_blocks,
            block_size,
            prefix_caching=caching,
            watermark=watermark,
            window_left=window,
            sink_tokens=sinks,
            null_block=self.null,
            _hash_bits=hash_bits,
        )
        self.naive = NaiveManager(
            num_blocks,
            block_size,
            caching,
            int(watermark * num_blocks),
            window,
            sinks,
            self.null if reserve else None,
        )
        self.cache = np.full((num_blocks, block_size), -7)
        self.freed: list[int] = []
        self.seen: Counter[str] = Counter()

    def live(self) -> list[int]:
        return sorted(self.naive.sequences)

    def length(self, id: int) -> int:
        return len(self.naive.sequences[id].tokens)

    def _real_tables(self, ids: list[int]) -> dict[int, list[int]]:
        return {id: self.real.block_table(id).tolist() for id in ids}

    def _write(self, slots: np.ndarray, tokens: list[int]) -> None:
        assert len(slots) == len(tokens)
        assert len(set(slots.tolist())) == len(slots)
        self.cache.reshape(-1)[slots] = tokens

    def allocate(
        self, tokens: list[int], known: bool = True, extra_key: int = 0, limit: int | None = None
    ) -> int | None:
        """The new sequence, or None where both agree that it does not fit."""
        prompt = {"tokens": tokens} if known else {"num_tokens": len(tokens)}
        fits = self.naive.fits("allocate", -1, tokens, known, extra_key, limit)
        assert self.real.can_allocate(**prompt, extra_key=extra_key, limit=limit) == fits
        matched = self.real.match_prefix(tokens, extra_key=extra_key)
        if not fits:
            self.seen["refused prompts"] += 1
            with pytest.raises(OutOfBlocksError) as refusal:
                self.real.allocate(**prompt, extra_key=extra_key, limit=limit)
            assert refusal.value.needed > refusal.value.available == self.naive.available()
            return None
        new = self.real.allocate(**prompt, extra_key=extra_key, limit=limit)
        cached = self.naive.allocate(
            new.id, tokens, known, extra_key, limit, self._real_tables([new.id])
        )
        assert new.cached_tokens == cached == (matched if known else 0)
        assert new.num_tokens == self.length(new.id)
        self._write(new.slot_mapping, tokens[cached : new.num_tokens])
        self.seen["hits"] += cached > 0
        return new.id

    def append(self, ids: list[int], new: list[list[int]]) -> bool:
        """Whether it fitted."""
        counts = [len(tokens) for tokens in new]
        flat = [token for tokens in new for token in tokens]
        argument = None if set(counts) == {1} else counts
        fits = self.naive.fits("append", ids, new)
        assert self.real.can_append(ids, argument) == fits
        if not fits:
            self.seen["refused appends"] += 1
            with pytest.raises(OutOfBlocksError) as refusal:
                self.real.append(ids, flat, argument)
            assert refusal.value.needed > refusal.value.available
            return False
        step = self.real.append(ids, flat, argument)
        copies = self.naive.append(ids, new, self._real_tables(ids))
        assert [tuple(pair) for pair in step.copies.tolist()] == copies
        assert not {source for source, _ in copies} & {target for _, target in copies}
        for source, target in copies:
            self.cache[target] = self.cache[source]
        self._write(step.slot_mapping, flat)
        self._check_step(step, ids, counts)
        self.seen["copies"] += len(copies)
        return True

    def view(self, ids: list[int]) -> None:
        width = max(len(self.naive.sequences[id].table) for id in ids) + 1
        counts = [min(1, self.length(id)) for id in ids]
        if self.naive.window == 0:
            counts = [0 for _ in ids]  # the last block may have left the window
        step = self.real.view(ids, counts, width=width)
        assert step.block_table.shape == (len(ids), width)
        assert step.copies.shape == (0, 2)
        self._check_step(step, ids, counts)

    def _check_step(self, step: Step, ids: list[int], counts: list[int]) -> None:
        assert step.slot_mapping.dtype == np.int64
        assert step.block_table.dtype == step.seq_lens.dtype == np.int32
        slots = []
        for row, length, id, count in zip(
            step.block_table, step.seq_lens, ids, counts, strict=True
        ):
            table = self._table(id)
            assert length == self.length(id)
            assert row.tolist() == table + [self.null] * (len(row) - len(table))
            for j in range(length - count, length):
                slots.append(row[j // self.size] * self.size + j % self.size)
        assert step.slot_mapping.tolist() == slots

    def _table(self, id: int) -> list[int]:
        table = self.naive.sequences[id].table
        return [self.null if block is None else block for block in table]

    def fork(self, parents: list[int]) -> None:
        for parent, child in zip(parents, self.real.fork(parents).tolist(), strict=True):
            self.naive.fork(parent, child)

    def free(self, ids: list[int]) -> None:
        self.real.free(ids)
        for id in ids:
            self.naive.free(id)
        self.freed += ids

    def free_again(self, id: int) -> None:
        # The first is alive, so that a free that did half of its work would show.
        with pytest.raises(DoubleFreeError):
            self.real.free([*self.live()[:1], id])

    def truncate(self, ids: list[int], lengths: list[int]) -> None:
        cuts = list(zip(ids, lengths, strict=True))
        if not all(self.naive.can_truncate(id, length) for id, length in cuts):
            self.seen["refused cuts"] += 1
            with pytest.raises(ValueError, match="reclaimed"):
                self.real.truncate(ids, lengths)
            return
        self.real.truncate(ids, lengths)
        for id, length in cuts:
            self.naive.truncate(id, length)

    def commit(self, ids: list[int], lengths: list[int] | None = None) -> None:
        self.real.commit(ids, lengths)
        for id, length in zip(ids, lengths or map(self.length, ids), strict=True):
            self.naive.commit(id, length)

    def clear_cache(self) -> None:
        self.real.clear_cache()
        self.naive.clear_cache()

    def check(self) -> None:
        self._check_account()
        self._check_tables()
        self._check_contents()

    def _check_account(self) -> None:
        stats = asdict(self.real.stats())
        assert {name: stats[name] for name in self.naive.stats()} == self.naive.stats()
        assert stats["num_blocks"] == (
            stats["free_blocks"] + stats["cached_blocks"] + stats["used_blocks"]
        )
        assert stats["waste"] <= stats["sequences"] * (self.size - 1)
        assert self.real.available_blocks == self.naive.available()
        self.seen["evictions"] = self.naive.evictions

    def _check_tables(self) -> None:
        holders: Counter[int] = Counter()
        places: dict[int, int] = {}
        for id in self.live():
            table = self.real.block_table(id).tolist()
            assert table == self._table(id)
            assert self.real.num_tokens(id) == self.length(id)
            blocks = [block for block in table if block != self.null]
            assert len(set(blocks)) == len(blocks)
            holders.update(blocks)
            for index, block in enumerate(table):
                # Whoever shares a block shares the place that it has in the sequence.
                assert block == self.null or places.setdefault(block, index) == index
            self.seen["reclaimed"] += self.null in table
            self.seen["lost prefixes"] += (
                self.naive.sequences[id].prefix is LOST
                and self.naive.caching
                and self.naive.sequences[id].known
            )
        for block in range(self.naive.num_blocks):
            assert self.real.ref_count(block) == holders[block]

    def _check_contents(self) -> None:
        for sequence in self.naive.sequences.values():
            for j, token in enumerate(sequence.tokens):
                block = sequence.table[j // self.size]
                if block is None:
                    continue
                assert self.cache[block, j % self.size] == token
                if sequence.known:
                    assert self.real.block_tokens(block)[j % self.size] == token
        for node in self.naive.nodes:
            assert tuple(self.cache[node.block]) == node.tokens
            assert tuple(self.real.block_tokens(node.block)) == node.tokens
            assert node.parent is None or node.parent in self.naive.nodes
        place = {block: i for i, block in enumerate(self.naive.lru)}
        for node in self.naive.nodes:
            if node.block in place and node.parent is not None and node.parent.block in place:
                assert place[node.block] < place[node.parent.block]  # leaves are taken first

    def finish(self) -> None:
        """Nothing is lost when everyone has gone."""
        self.real.free(self.live())
        self.real.clear_cache()
        stats = self.real.stats()
        assert stats.free_blocks == stats.num_blocks
        assert (stats.tokens, stats.stored_tokens, stats.waste) == (0, 0, 0)
