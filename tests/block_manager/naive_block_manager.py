"""The block manager written from its definition, slowly: what the real one is held against.

Reference counts are counted, prefixes are compared token by token, and whether an operation fits
is found by trying it on a copy. Only which of several free blocks is taken is the real manager's
choice: it is read off its tables, and must be one that was free.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field


class NoBlockError(Exception):
    """The pool is empty."""


@dataclass(eq=False)
class Node:
    """A full block that prompts can find; it stands for the tokens up to its end."""

    block: int
    parent: Node | None
    extra_key: int
    tokens: tuple[int, ...]


LOST = Node(-1, None, 0, ())  # never among the nodes


@dataclass
class NaiveSequence:
    tokens: list[int]
    known: bool
    extra_key: int
    table: list[int | None] = field(default_factory=list)
    committed: int = 0
    offered: int = 0  # blocks that commit() has offered to the cache
    prefix: Node | None = None  # of the offered blocks


@dataclass
class NaiveManager:
    num_blocks: int
    block_size: int
    caching: bool = True
    watermark: int = 0
    window: int | None = None
    sinks: int = 0
    reserved: int | None = None

    def __post_init__(self) -> None:
        self.sequences: dict[int, NaiveSequence] = {}
        self.nodes: list[Node] = []
        self.lru: list[int] = []  # unreferenced blocks with contents, oldest first
        self.free_blocks = set(range(self.num_blocks)) - {self.reserved}
        self.evictions = 0

    # Blocks.

    def references(self, block: int) -> int:
        return sum(sequence.table.count(block) for sequence in self.sequences.values())

    def available(self) -> int:
        return len(self.free_blocks) + len(self.lru)

    def node_of(self, block: int | None) -> Node | None:
        return next((node for node in self.nodes if node.block == block), None)

    def take(self, chosen: int | None) -> int:
        """The block `chosen` by the real manager, or on a trial any."""
        if not self.free_blocks:
            if not self.lru:
                raise NoBlockError
            before = len(self.lru)
            self.forget(self.node_of(self.lru[0]))
            self.evictions += before - len(self.lru)
        block = min(self.free_blocks) if chosen is None else chosen
        assert block in self.free_blocks, f"block {block} was handed out, but is not free"
        self.free_blocks.remove(block)
        return block

    def drop(self, sequence: NaiveSequence, index: int) -> None:
        """Entry `index` of the table no longer refers to its block."""
        block = sequence.table[index]
        sequence.table[index] = None
        if block is None or self.references(block):
            return
        node = self.node_of(block)
        if node is None:
            self.free_blocks.add(block)
            return
        self.lru.append(block)
        while node.parent is not None and node.parent.block in self.lru:
            node = node.parent
            self.lru.remove(node.block)
            self.lru.append(node.block)

    def forget(self, node: Node | None) -> None:
        assert node is not None
        for child in [child for child in self.nodes if child.parent is node]:
            self.forget(child)
        self.nodes.remove(node)
        if node.block in self.lru:
            self.lru.remove(node.block)
            self.free_blocks.add(node.block)

    # Prefixes.

    def find(self, parent: Node | None, extra_key: int, tokens: tuple[int, ...]) -> Node | None:
        for node in self.nodes:
            if (node.parent, node.extra_key, node.tokens) == (parent, extra_key, tokens):
                return node
        return None

    def match(self, tokens: list[int], extra_key: int) -> list[Node]:
        hits: list[Node] = []
        size = self.block_size
        while (len(hits) + 1) * size < len(tokens):
            block = tuple(tokens[len(hits) * size : (len(hits) + 1) * size])
            node = self.find(hits[-1] if hits else None, extra_key, block)
            if node is None:
                break
            hits.append(node)
        return hits

    # Operations. `tables` are the real manager's, by id; none on a trial.

    def fits(self, operation: str, *arguments: object) -> bool:
        trial = copy.deepcopy(self)
        try:
            getattr(trial, operation)(*arguments)
        except NoBlockError:
            return False
        return operation != "allocate" or trial.available() >= trial.watermark

    def allocate(
        self,
        id: int,
        tokens: list[int],
        known: bool = True,
        extra_key: int = 0,
        limit: int | None = None,
        tables: dict[int, list[int]] | None = None,
    ) -> int:
        hits = self.match(tokens, extra_key) if known and self.caching else []
        cached = len(hits) * self.block_size
        new = tokens[cached:] if limit is None else tokens[cached : cached + limit]
        prefix = (hits[-1] if hits else None) if known and self.caching else LOST
        sequence = NaiveSequence(tokens[:cached], known, extra_key, [], cached, len(hits), prefix)
        for node in hits:
            sequence.table.append(node.block)
            if node.block in self.lru:
                self.lru.remove(node.block)
        self.sequences[id] = sequence
        self.reclaim(sequence)
        self.grow(id, new, tables)
        return cached

    def append(
        self,
        ids: list[int],
        tokens: list[list[int]],
        tables: dict[int, list[int]] | None = None,
    ) -> list[tuple[int, int]]:
        copies: list[tuple[int, int]] = []
        for id, new in zip(ids, tokens, strict=True):
            if new:
                self.reclaim(self.sequences[id])
        for id, new in zip(ids, tokens, strict=True):
            sequence = self.sequences[id]
            if new and len(sequence.tokens) % self.block_size:
                last = sequence.table[-1]
                assert last is not None
                if self.references(last) > 1:
                    index = len(sequence.table) - 1
                    block = self.take(tables[id][index] if tables else None)
                    self.drop(sequence, index)
                    sequence.table[index] = block
                    copies.append((last, block))
                elif (node := self.node_of(last)) is not None:
                    self.forget(node)
            self.grow(id, new, tables)
        return copies

    def grow(self, id: int, new: list[int], tables: dict[int, list[int]] | None) -> None:
        sequence = self.sequences[id]
        for token in new:
            if len(sequence.tokens) == len(sequence.table) * self.block_size:
                index = len(sequence.table)
                sequence.table.append(self.take(tables[id][index] if tables else None))
            sequence.tokens.append(token)

    def reclaim(self, sequence: NaiveSequence) -> None:
        if self.window is None:
            return
        size, length = self.block_size, len(sequence.tokens)
        for index in reversed(range(len(sequence.table))):
            positions = range(index * size, (index + 1) * size)
            if all(self.sinks <= j < length - self.window for j in positions):
                self.drop(sequence, index)

    def fork(self, parent: int, child: int) -> None:
        original = self.sequences[parent]
        self.sequences[child] = copy.copy(original)
        self.sequences[child].table = list(original.table)
        self.sequences[child].tokens = list(original.tokens)

    def free(self, id: int) -> None:
        sequence = self.sequences[id]
        for index in reversed(range(len(sequence.table))):
            self.drop(sequence, index)
        del self.sequences[id]

    def can_truncate(self, id: int, length: int) -> bool:
        """Whether the token that will stand at `length` finds all that it sees, itself included."""
        sequence = self.sequences[id]
        if self.window is None:
            return True
        for j in range(max(0, length - self.window), length + 1):
            index = j // self.block_size
            if index * self.block_size < length and sequence.table[index] is None:
                return False
        return True

    def truncate(self, id: int, length: int) -> None:
        sequence = self.sequences[id]
        del sequence.tokens[length:]
        sequence.committed = min(sequence.committed, length)
        while (len(sequence.table) - 1) * self.block_size >= length and sequence.table:
            self.drop(sequence, len(sequence.table) - 1)
            sequence.table.pop()
        while sequence.offered > length // self.block_size:
            sequence.offered -= 1
            if sequence.prefix in self.nodes:
                assert sequence.prefix is not None
                sequence.prefix = sequence.prefix.parent
        if sequence.offered == 0 and sequence.known and self.caching:
            sequence.prefix = None

    def commit(self, id: int, length: int) -> None:
        sequence = self.sequences[id]
        sequence.committed = max(sequence.committed, length)
        size = self.block_size
        while (sequence.offered + 1) * size <= sequence.committed:
            block = sequence.table[sequence.offered]
            tokens = tuple(sequence.tokens[sequence.offered * size :][:size])
            sequence.offered += 1
            if block is None or (sequence.prefix is not None and sequence.prefix not in self.nodes):
                sequence.prefix = LOST
                continue
            node = self.find(sequence.prefix, sequence.extra_key, tokens)
            if node is None:
                node = Node(block, sequence.prefix, sequence.extra_key, tokens)
                self.nodes.append(node)
            sequence.prefix = node

    def clear_cache(self) -> None:
        for node in [node for node in self.nodes if node.parent is None]:
            self.forget(node)

    # The account.

    def filled_slots(self) -> set[tuple[int, int]]:
        size = self.block_size
        return {
            (block, j % size)
            for sequence in self.sequences.values()
            for j in range(len(sequence.tokens))
            if (block := sequence.table[j // size]) is not None
        }

    def stats(self) -> dict[str, int]:
        blocks = set(range(self.num_blocks)) - {self.reserved}
        references = [self.references(block) for block in blocks]
        used = sum(r > 0 for r in references)
        stored = len(self.filled_slots())
        return {
            "num_blocks": len(blocks),
            "free_blocks": len(self.free_blocks),
            "cached_blocks": len(self.lru),
            "used_blocks": used,
            "shared_blocks": sum(r > 1 for r in references),
            "indexed_blocks": len(self.nodes),
            "sequences": len(self.sequences),
            "tokens": sum(len(s.tokens) for s in self.sequences.values()),
            "stored_tokens": stored,
            "waste": used * self.block_size - stored,
            "evictions": self.evictions,
        }
