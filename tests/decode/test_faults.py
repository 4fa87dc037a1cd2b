"""Ten thousand requests under load: cancelled, out of blocks, with a model and a draft that fail.

Whatever happens to others, a request that ends has the tokens of an undisturbed run, bit by bit
(``batch_invariant``), and not a block is lost.
"""

from __future__ import annotations

import random

import pytest
import torch
from engine_runs import assert_nothing_left, greedy, prompt_of, random_params
from plain_models import PlainLm

from pumice.decode import Engine, SamplingParams
from pumice.decode.draft import Draft, Proposal

RAISES, NAN = 60, 59  # tokens: the model raises when it sees the one, and gives NaN after the other


class Faulty(PlainLm):
    """Small and quick, and it fails: with certain tokens, and now and then without a reason."""

    def __init__(self) -> None:
        super().__init__(layers=1, width=16, heads=2, kv_heads=1, dim=8, value_dim=8)
        with torch.no_grad():
            self.head.bias[[RAISES, NAN]] = -1e4  # it never generates them itself
        self.chance = random.Random(0)
        self.rate = 0.0
        self.after_writing = False

    def forward_paged(self, input_ids, positions, batch, rows):
        fails = bool((input_ids == RAISES).any()) or self.chance.random() < self.rate
        self.after_writing = not self.after_writing
        if fails and not self.after_writing:
            raise RuntimeError("out of order")
        logits = super().forward_paged(input_ids, positions, batch, rows)
        if fails:
            raise RuntimeError("out of order, after writing to the cache")
        seen = input_ids if rows is None else input_ids[rows]
        return logits.masked_fill((seen == NAN)[:, None], torch.nan)


class Requests:
    """Kinds of requests, and what each gives undisturbed."""

    def __init__(self, engine: Engine, *, kinds: int = 150, greedy_only: bool = False) -> None:
        chance = random.Random(1)
        self.kinds: list[tuple[list[int], SamplingParams]] = []
        for i in range(kinds):
            prompt = prompt_of(chance.choice([1, 3, 9, 14, 22]), seed=chance.randrange(40))
            prompt = [token % NAN for token in prompt]
            count, n = chance.randint(1, 12), chance.choice([1, 1, 1, 2, 3])
            if greedy_only or chance.random() < 0.4:
                self.kinds.append((prompt, greedy(count, n=n)))
            else:
                self.kinds.append((prompt, random_params(count, seed=i, n=n)))
        self.expected: list[dict[int, list[int]]] = []
        for prompt, params in self.kinds:
            engine.add(prompt, params)
            samples: dict[int, list[int]] = {}
            while engine.has_work:
                for output in engine.step():
                    samples.setdefault(output.index, []).extend(output.tokens)
            self.expected.append(samples)


def storm(engine: Engine, model: Faulty, requests: Requests, count: int) -> dict[str, int]:
    """So many requests; cancels, failures and bad ones at random. What happened how often."""
    chance = random.Random(2)
    tally = dict.fromkeys(["finished", "cancelled", "errors", "refused"], 0)
    live: dict[int, tuple[int, dict[int, list[int]]]] = {}
    added = 0
    model.rate = 0.01
    while added < count or engine.has_work:
        while added < count and len(live) < 40:
            added += 1
            kind = chance.randrange(len(requests.kinds))
            prompt, params = requests.kinds[kind]
            lot = chance.random()
            if lot < 0.01:
                with pytest.raises(ValueError, match="need room for"):
                    engine.add(prompt * 400, params)
                tally["refused"] += 1
            elif lot < 0.02:
                spoiled = chance.choice([[*prompt, RAISES, *prompt], [*prompt, NAN]])
                live[engine.add(spoiled, params)] = (-1, {})
            else:
                live[engine.add(prompt, params)] = (kind, {})
        if live and chance.random() < 0.3:
            id = chance.choice(list(live))
            engine.cancel(id)
            del live[id]
            tally["cancelled"] += 1
        ended = {}
        for output in engine.step():
            kind, samples = live[output.id]
            samples.setdefault(output.index, []).extend(output.tokens)
            if output.error is not None:
                # Only what cannot succeed; or by chance twice in a row, the second time alone.
                assert kind < 0 or "out of order" in str(output.error)
                ended[output.id] = None
            elif output.finished:
                assert kind >= 0, "this request cannot succeed"
                ended.setdefault(output.id, kind)
        for id, kind in ended.items():
            samples = live[id][1]
            if kind is None:
                if id in engine._live:
                    engine.cancel(id)
                del live[id]
                tally["errors"] += 1
            elif id not in engine._live:
                assert samples == requests.expected[kind]
                del live[id]
                tally["finished"] += 1
    assert not live
    assert_nothing_left(engine)
    return tally


def test_ten_thousand_requests_and_not_a_block_lost():
    model = Faulty()
    options = {"block_size": 4, "max_batch_tokens": 48, "max_sequences": 24}
    requests = Requests(Engine(model, num_blocks=200, batch_invariant=True, **options))
    engine = Engine(model, num_blocks=60, batch_invariant=True, **options)
    tally = storm(engine, model, requests, 10_000)
    stats = engine.stats()
    assert sum(tally.values()) == 10_000
    assert tally["finished"] > 7000
    assert min(tally.values()) > 50
    assert stats.preemptions > 500
    assert stats.failed_passes > 50
    assert stats.cache.prompt_hits > 10_000
    assert stats.cache.evictions > 1000


class Unreliable(Draft):
    """Repeats what followed the last token before; raises, or proposes nonsense, now and then."""

    max_drafts = 3

    def __init__(self) -> None:
        self.chance = random.Random(3)
        self.known: set[int] = set()

    def propose(self, requests):
        lot = self.chance.random()
        if lot < 0.02:
            raise RuntimeError("no idea")
        self.known |= {request.id for request in requests}
        drafts = []
        for request in requests:
            tokens = list(request.tokens)
            last = max((i for i, t in enumerate(tokens[:-1]) if t == tokens[-1]), default=None)
            found = [1, 2, 3] if last is None else tokens[last + 1 : last + 4]
            drafts.append(found[: request.max_drafts])
        if lot < 0.03:
            drafts[0] = [999] * requests[0].max_drafts or [1]
        return Proposal.of(drafts)

    def accepted(self, id, num_drafts, num_accepted):
        assert 0 <= num_accepted <= num_drafts <= self.max_drafts
        assert id in self.known
        if self.chance.random() < 0.001:
            raise RuntimeError("so what")

    def release(self, id):
        self.known.discard(id)


def test_a_draft_that_fails_costs_nobody_anything():
    model, draft = Faulty(), Unreliable()
    options = {"block_size": 4, "max_batch_tokens": 48, "max_sequences": 24}
    roomy = Engine(model, num_blocks=200, batch_invariant=True, **options)
    requests = Requests(roomy, kinds=60, greedy_only=True)
    engine = Engine(model, num_blocks=60, batch_invariant=True, draft=draft, **options)
    with pytest.warns(
        RuntimeWarning, match="Unreliable failed, this step goes without drafts"
    ) as w:
        tally = storm(engine, model, requests, 1000)
    assert {"no idea", "so what"} <= {str(one.message).rpartition(": ")[2] for one in w}
    assert any("not all of the vocabulary of 61 tokens" in str(one.message) for one in w)
    assert tally["finished"] > 700
    assert engine.stats().accepted > 100
    assert not draft.known


# One fault at a time.


def collect(engine):
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert_nothing_left(engine)
    return outputs


def tokens_by_id(outputs):
    found = {}
    for output in outputs:
        found.setdefault(output.id, []).extend(output.tokens)
    return found


PROMPTS = [[token % NAN for token in prompt_of(n, seed=n)] for n in (3, 9, 20)]


def test_the_request_with_which_the_model_raises_ends_and_no_other():
    model = Faulty()
    engine = Engine(model, num_blocks=60, block_size=4)
    expected = []
    for prompt in PROMPTS:
        engine.add(prompt, greedy(6))
        expected.append(tokens_by_id(collect(engine)).popitem()[1])
    good = [engine.add(prompt, greedy(6)) for prompt in PROMPTS[:2]]
    engine.step()
    bad = engine.add([1, 2, RAISES], greedy(6))
    good.append(engine.add(PROMPTS[2], greedy(6)))
    outputs = collect(engine)
    (failed,) = [output for output in outputs if output.error is not None]
    assert (failed.id, failed.finish_reason, failed.tokens) == (bad, "error", [])
    assert str(failed.error).startswith("out of order")
    tokens = tokens_by_id(outputs)
    for id, complete in zip(good, expected, strict=True):
        assert complete[-len(tokens[id]) :] == tokens[id]
    assert engine.stats().failed_passes == 2  # together, and alone


def test_logits_that_are_no_distribution_end_their_request_only():
    engine = Engine(Faulty(), num_blocks=60, block_size=4)
    good = engine.add(PROMPTS[0], greedy(6))
    bad = [engine.add([1, 2, NAN], one) for one in (greedy(6), random_params(6))]
    outputs = collect(engine)
    failed = [output for output in outputs if output.error is not None]
    assert [output.id for output in failed] == bad
    for output in failed:
        assert "position 3 are no distribution" in str(output.error)
        assert output.tokens == []
    assert len(tokens_by_id(outputs)[good]) == 6


def test_an_interrupt_goes_through_and_nothing_is_lost():
    model = Faulty()
    engine = Engine(model, num_blocks=60, block_size=4)
    for prompt in PROMPTS:
        engine.add(prompt, greedy(6))
    undisturbed = tokens_by_id(collect(engine))
    ids = [engine.add(prompt, greedy(6)) for prompt in PROMPTS]
    first = engine.step()
    forward = model.forward_paged

    def interrupted(*arguments):
        raise KeyboardInterrupt

    model.forward_paged = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    model.forward_paged = forward
    found = tokens_by_id([*first, *collect(engine)])
    assert [found[id] for id in ids] == list(undisturbed.values())


@pytest.mark.parametrize("shape", [(3, 7), (3, 61)])
def test_a_model_that_gives_something_else_than_logits(shape):
    model = Faulty()
    engine = Engine(model, num_blocks=60, block_size=4)
    model.forward_paged = lambda ids, positions, batch, rows: (
        batch.attend(0, *torch.ones(3, len(ids), 1, 8)), torch.zeros(shape)
    )[1]  # fmt: skip
    for prompt in PROMPTS[:2]:
        engine.add(prompt, greedy(6))
    outputs = collect(engine)
    assert [output.finish_reason for output in outputs] == ["error"] * 2
    assert "the model gave logits of shape" in str(outputs[0].error)


def test_a_tokenizer_that_raises_ends_its_request_only():
    class Picky:
        def decode(self, tokens, **_):
            if 7 in tokens:
                raise ValueError("not seven")
            return "x" * len(tokens)

    engine = Engine(Faulty(), num_blocks=60, block_size=4, tokenizer=Picky())
    plain = Engine(Faulty(), num_blocks=60, block_size=4)
    kinds = [([1, 2, 3], random_params(12, seed)) for seed in range(20)]
    for prompt, params in kinds:
        engine.add(prompt, params)
        plain.add(prompt, params)
    with_text, without = collect(engine), tokens_by_id(collect(plain))
    failed = {output.id for output in with_text if output.error is not None}
    assert failed == {id for id, tokens in without.items() if 7 in tokens}
    assert 0 < len(failed) < 20


def test_a_draft_with_another_vocabulary_is_refused():
    draft = Unreliable()
    draft.vocab_size = 62
    with pytest.raises(ValueError, match="vocabulary of 62 tokens, but the target of 61"):
        Engine(Faulty(), num_blocks=60, draft=draft)
