"""Any sequence of operations, against the naive manager."""

from __future__ import annotations

import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from paired_block_managers import PairedManagers

TOKEN = st.integers(0, 1)  # few, so that prompts share prefixes


class BlockManagerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(2, 20),
        block_size=st.integers(1, 4),
        caching=st.sampled_from([True, True, True, False]),
        watermark=st.sampled_from([0.0, 0.0, 0.2]),
        window=st.sampled_from([None, None, 0, 1, 3, 6]),
        sinks=st.sampled_from([0, 1, 4]),
        reserve=st.booleans(),
        hash_bits=st.sampled_from([64, 2, 0]),
    )
    def start(self, **options):
        self.managers = PairedManagers(**options)
        self.managers.allocate([0, 1])

    def some(self, data: st.DataObject) -> list[int]:
        live = self.managers.live()
        return data.draw(st.lists(st.sampled_from(live), unique=True, min_size=1)) if live else []

    @rule(
        data=st.data(),
        extra_key=st.sampled_from([0, 0, -1]),
        known=st.sampled_from([True, True, True, False]),
        limit=st.sampled_from([None, None, 0, 5]),
        computed=st.booleans(),
    )
    def allocate(self, data, known, extra_key, limit, computed):
        tokens = data.draw(st.lists(TOKEN, max_size=4 * self.managers.size + 2))
        if self.managers.live() and data.draw(st.booleans()):  # go on from another's
            other = data.draw(st.sampled_from(self.managers.live()))
            tokens = self.managers.naive.sequences[other].tokens + tokens[:3]
        id = self.managers.allocate(tokens, known, extra_key, limit)
        if id is not None and computed:
            self.managers.commit([id])

    @rule(data=st.data(), computed=st.booleans())
    def append(self, data, computed):
        ids = self.some(data)
        longest = data.draw(st.sampled_from([1, 2 * self.managers.size + 1]))
        new = [data.draw(st.lists(TOKEN, min_size=1, max_size=longest)) for _ in ids]
        if data.draw(st.integers(0, 9)) == 0:
            new[:1] = [[]] if new else []
        if self.managers.append(ids, new) and computed:
            self.managers.commit(ids)

    @rule(data=st.data())
    def view(self, data):
        if ids := self.some(data):
            self.managers.view(ids)

    @rule(data=st.data(), copies=st.integers(1, 3))
    def fork(self, data, copies):
        self.managers.fork(self.some(data)[:2] * copies)

    @rule(data=st.data())
    def free(self, data):
        self.managers.free(self.some(data)[:3])

    @rule(data=st.data())
    def free_again(self, data):
        if self.managers.freed:
            self.managers.free_again(data.draw(st.sampled_from(self.managers.freed)))

    @rule(data=st.data())
    def truncate(self, data):
        ids = self.some(data)
        most = 2 * self.managers.size
        cuts = [min(data.draw(st.integers(0, most)), self.managers.length(id)) for id in ids]
        lengths = [self.managers.length(id) - cut for id, cut in zip(ids, cuts, strict=True)]
        self.managers.truncate(ids, lengths)

    @rule(data=st.data())
    def commit(self, data):
        ids = self.some(data)
        lengths = [data.draw(st.integers(0, self.managers.length(id))) for id in ids]
        self.managers.commit(ids, data.draw(st.sampled_from([None, lengths])))

    @rule(really=st.integers(0, 4))
    def clear_cache(self, really):
        if really == 0:
            self.managers.clear_cache()

    @invariant()
    def both_agree(self):
        if hasattr(self, "managers"):
            self.managers.check()

    def teardown(self):
        if hasattr(self, "managers"):
            self.managers.finish()


TestAnyOperations = BlockManagerMachine.TestCase
TestAnyOperations.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def walk(managers: PairedManagers, choose: random.Random, steps: int) -> None:
    """Operations in the proportions of a busy server: the pool is always nearly full."""
    for _ in range(steps):
        live = managers.live()
        ids = choose.sample(live, choose.randint(1, min(4, len(live)))) if live else []
        draw = choose.random()
        if draw < 0.25 or not ids:
            tokens = [0] * choose.randint(0, 3) * managers.size
            if live and choose.random() < 0.7:
                tokens = managers.naive.sequences[choose.choice(live)].tokens[
                    : choose.randint(1, 30)
                ]
            tokens = tokens + choose.choices([0, 1], k=choose.randint(0, 2 * managers.size))
            known = choose.random() < 0.9
            key = int(choose.random() < 0.1)
            limit = choose.choice([None, None, None, 4])
            id = managers.allocate(tokens, known, key, limit)
            if id is not None and choose.random() < 0.8:
                managers.commit([id])
            if id is None:
                managers.free(choose.sample(live, min(2, len(live))))
        elif draw < 0.7:
            most = choose.choice([1, 1, 2 * managers.size])
            new = [choose.choices([0, 1], k=choose.randint(1, most)) for _ in ids]
            if not managers.append(ids, new):
                managers.free(ids[:2])
            elif choose.random() < 0.8:
                managers.commit(ids)
        elif draw < 0.78:
            managers.fork(ids[:1] * choose.randint(1, 2))
        elif draw < 0.88:
            managers.free(ids[:2])
        elif draw < 0.98:
            cuts = [choose.randint(0, managers.size + 1) for _ in ids]
            lengths = [max(0, managers.length(i) - cut) for i, cut in zip(ids, cuts, strict=True)]
            managers.truncate(ids, lengths)
        elif draw < 0.995:
            managers.view(ids)
        else:
            managers.clear_cache()
        managers.check()


@pytest.mark.parametrize("window", [None, 2, 7])
def test_busy_pool(window):
    """Long random runs; what they met is counted, so that they cannot come to test nothing."""
    seen: Counter[str] = Counter()
    for seed in range(20):
        choose = random.Random(seed)
        managers = PairedManagers(
            choose.randint(10, 24),
            choose.randint(1, 4),
            watermark=choose.choice([0.0, 0.1]),
            window=window,
            sinks=choose.choice([0, 1, 5]),
            reserve=choose.random() < 0.5,
            hash_bits=choose.choice([64, 1]),
        )
        walk(managers, choose, 150)
        managers.finish()
        seen += managers.seen
    for event in ("hits", "evictions", "copies", "refused prompts", "refused appends"):
        assert seen[event] >= 20, seen
    if window is not None:
        for event in ("reclaimed", "refused cuts", "lost prefixes"):
            assert seen[event] >= 5, seen
