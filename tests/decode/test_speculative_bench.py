"""The benchmark and the demo of drafts, on a tiny model: the numbers are what they are called."""

import math

import pytest
import torch

from bench.speculative import Contender, Row, logit_difference, markdown, mean_overlap, measure
from demo import speculative as demo
from pumice.decode import ModelDraft, NgramDraft, expected_tokens
from tiny_transformers import build


@pytest.fixture(scope="module")
def model():
    return build("llama")


PROMPTS = {"short": [1, 2, 3, 4, 5], "longer": list(range(20))}


@pytest.fixture(scope="module")
def rows(model):
    drafts = [
        Contender("itself", lambda: ModelDraft(model, 3, num_blocks=64), model),
        Contender("n-grams", lambda: NgramDraft(3, min_ngram=1)),
    ]
    return measure(model, PROMPTS, drafts, tokens=25, rounds=2)


def test_there_is_a_row_for_each_draft_text_and_temperature(rows):
    assert [(r.temperature, r.text, r.draft) for r in rows] == [
        (t, text, draft) for t in (0.0, 1.0) for text in PROMPTS for draft in ("itself", "n-grams")
    ]


def test_a_draft_that_is_the_target_is_accepted(rows):
    for row in rows:
        if row.draft == "itself":
            assert row.acceptance > 0.99
            assert row.overlap > 0.99
            assert row.overall == pytest.approx(24 / 6, abs=0.2)
            assert row.tokens_per_pass == pytest.approx(row.expected, abs=0.1)


def test_greedy_tokens_are_the_same(rows):
    assert all(row.same == row.tokens == 25 for row in rows if row.temperature == 0)
    assert all(math.isnan(row.apart) for row in rows)


def test_numbers_belong_together(rows):
    for row in rows:
        assert row.plain > 0
        assert row.speedup == pytest.approx(row.speed / row.plain)
        if row.draft == "n-grams":
            assert math.isnan(row.overlap)
        if row.acceptance == row.acceptance:
            assert 1 <= row.tokens_per_pass <= 1 + row.gamma
            assert row.expected <= expected_tokens(row.acceptance, row.gamma) + 1e-9


def test_the_overlap_of_unlike_models_is_less(model):
    other = build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.3)
    ids = list(range(30))
    assert mean_overlap(model, model, ids, ids, 1.0) == pytest.approx(1, abs=1e-5)
    assert 0.05 < mean_overlap(model, other, ids, ids, 1.0) < 0.99
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    assert logit_difference(model, ids, 3, 9) == pytest.approx(
        float((logits[3] - logits[9]).abs()), abs=1e-5
    )


def test_the_tables_hold_every_row(rows):
    text = markdown(rows)
    assert len(text.splitlines()) == 2 + len(rows)
    assert text.count("| itself |") == 4
    assert demo.table(rows).row_count == len(rows)


def test_the_demo_tells_rounding_from_another_text():
    same = Row("d", "t", 0.0, 4, 0.5, 0.5, 1.5, 1.5, 1.5, 9.0, 12.0, 64, 64)
    rounding = Row(*list(vars(same).values())[:-3], 20, 64, 1e-5)
    another = Row(*list(vars(same).values())[:-3], 20, 64, 0.5)
    nothing = Row(*list(vars(same).values())[:-3], 20, 64)
    drawn = Row("d", "t", 1.0, *list(vars(same).values())[3:-3], 2, 64)
    verdict = demo.verdict([same, rounding, another, nothing, drawn], 1e-4)
    assert [holds for _, holds in verdict] == [True, True, False, False]
