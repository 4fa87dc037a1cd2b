"""Masks against brute force: counts, choices, ties."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pumice.prune.pattern import (
    NofM,
    check_n_of_m,
    check_ratio,
    keep,
    keep_n_of_m,
    ratio_of,
    smallest,
    zeros_of,
)


def brute_smallest(row, count):
    """The indices of the count smallest, of equal ones the first."""
    return set(sorted(range(len(row)), key=lambda i: (row[i], i))[:count])


# Few distinct values, so that there are many ties.
scores = st.integers(0, 1000).map(
    lambda seed: torch.randint(0, 6, (5, 24), generator=torch.Generator().manual_seed(seed)).float()
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scores, st.integers(0, 24))
def test_the_smallest_of_each_row(score, count):
    found = smallest(score, count)
    for row, mask in zip(score.tolist(), found.tolist(), strict=True):
        assert {i for i, dropped in enumerate(mask) if dropped} == brute_smallest(row, count)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scores, st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (5, 6), (3, 24), (2, 3)]))
def test_n_of_every_m_are_kept(score, pattern):
    n, m = pattern
    kept = keep_n_of_m(score, NofM(n, m))
    for row in range(5):
        for start in range(0, 24, m):
            group = score[row, start : start + m].tolist()
            stays = {i for i in range(m) if kept[row, start + i]}
            assert stays == set(range(m)) - brute_smallest(group, m - n)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(scores, st.floats(0, 1, exclude_max=True))
def test_a_share_of_each_row_or_of_all(score, ratio):
    by_row = keep(score, ratio)
    assert ((~by_row).sum(1) == zeros_of(ratio, 24)).all()
    of_all = keep(score, ratio, by_row=False)
    count = zeros_of(ratio, score.numel())
    flat = score.T.flatten().tolist()  # columns first: an earlier column goes first
    dropped = {i for i, kept in enumerate(of_all.T.flatten().tolist()) if not kept}
    assert dropped == brute_smallest(flat, count)


def test_the_number_of_zeros_is_the_nearest():
    assert zeros_of(0.5, 7) == 4  # halves up
    assert zeros_of(0.0, 100) == 0
    assert zeros_of(0.999, 100) == 100
    assert all(abs(zeros_of(r / 97, 1000) - 1000 * r / 97) <= 0.5 for r in range(97))


def test_the_first_number_counts_what_is_kept():
    pattern = NofM.parse("1:4", "here")
    assert (pattern.kept, pattern.of, pattern.ratio, str(pattern)) == (1, 4, 0.75, "1:4")
    assert keep_n_of_m(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), pattern).tolist() == [
        [True, False, False, False]
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2of4", "Wanda: pattern must be like '2:4'.*not '2of4'"),
        ("2:4:8", "pattern must be like"),
        (" 2:4", "pattern must be like"),
        (24, "pattern must be like.*not 24"),
        ("4:4", "must keep at least 1 of every 4 inputs, and fewer than all 4"),
        ("0:4", "must keep at least 1"),
        ("5:4", "fewer than all 4"),
        ("1:0", "must keep at least 1 of every 0"),
    ],
)
def test_bad_patterns(text, message):
    with pytest.raises(ValueError, match=message):
        NofM.parse(text, "Wanda")


@pytest.mark.parametrize("ratio", [1, 1.0, -0.1, float("nan"), float("inf")])
def test_ratios_are_below_one(ratio):
    with pytest.raises(ValueError, match=r"here: ratio.*must be in \[0, 1\)"):
        check_ratio(ratio, "here")


@pytest.mark.parametrize("ratio", [True, "0.5", None])
def test_ratios_are_numbers(ratio):
    with pytest.raises(TypeError, match="here: ratio must be a number"):
        check_ratio(ratio, "here")


def test_the_first_pattern_that_fits_a_name_counts():
    ratios = {"q_proj": 0.1, "model.*.mlp.*": 0.2, "*": 0.3}
    names = ["model.0.self_attn.q_proj", "model.0.mlp.up_proj", "model.0.self_attn.k_proj"]
    assert [ratio_of(ratios, name, "here") for name in names] == [0.1, 0.2, 0.3]
    assert ratio_of(0.7, "anything", "here") == 0.7
    with pytest.raises(ValueError, match=r"here: no pattern.*layer 'other', only q_proj; add '\*'"):
        ratio_of({"q_proj": 0.1}, "other", "here")


def test_a_weight_that_is_not_2_of_4_is_named_by_row_and_group():
    weight = torch.zeros(3, 12)
    weight[:, ::2] = 1.0
    weight[:, 1] = -0.0  # a zero
    check_n_of_m(weight, NofM(2, 4), "the weight")
    weight[1, 9] = 1e-30
    with pytest.raises(
        ValueError, match=r"the weight is not 2:4: row 1, group 2 \(columns 8 … 11\) holds 3"
    ):
        check_n_of_m(weight, NofM(2, 4), "the weight")
    with pytest.raises(ValueError, match="multiple of 8 inputs, but the layer has 12"):
        check_n_of_m(weight, NofM(4, 8), "the weight")
