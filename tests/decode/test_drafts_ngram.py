"""Prompt lookup: the index against a search of the whole text, and what is proposed."""

import random
import time
from dataclasses import dataclass

import pytest
import torch

from pumice.decode.draft import Draft, DraftRequest, Proposal, check_vocabulary
from pumice.decode.draft_ngram import NgramDraft, NgramIndex


@dataclass
class Params:
    """N-grams do not look at how tokens are chosen."""

    temperature: float = 0.0


def request(tokens, max_drafts=8, id=0):
    return DraftRequest(id, tokens, max_drafts, Params())


def drafts(draft, tokens, max_drafts=8, id=0):
    proposal = draft.propose([request(tokens, max_drafts, id)])
    assert proposal.probs is None
    assert proposal.tokens.dtype == torch.int64
    assert proposal.num_drafts.dtype == torch.int32
    return proposal.tokens[0, : int(proposal.num_drafts[0])].tolist()


def searched_place(tokens, min_ngram, max_ngram):
    """By looking through the text: after the last occurrence of the longest n-gram that ends it."""
    for n in range(min(max_ngram, len(tokens) - 1), min_ngram - 1, -1):
        for begin in range(len(tokens) - n - 1, -1, -1):
            if tokens[begin : begin + n] == tokens[-n:]:
                return begin + n
    return None


@pytest.mark.parametrize(("min_ngram", "max_ngram"), [(1, 1), (1, 3), (2, 4), (3, 3)])
def test_the_index_finds_what_a_search_of_the_text_finds(min_ngram, max_ngram):
    generator = random.Random(min_ngram * 10 + max_ngram)
    found = 0
    for _ in range(40):
        text = [generator.randrange(4) for _ in range(generator.randrange(1, 60))]
        index = NgramIndex(min_ngram, max_ngram)
        grown = 0
        while grown < len(text):  # in pieces, as a request's tokens come
            size = generator.randrange(1, 6)
            index.extend(text[grown : grown + size])
            grown = min(grown + size, len(text))
            expected = searched_place(text[:grown], min_ngram, max_ngram)
            places = index.places()
            assert (places[0] if places else None) == expected
            found += expected is not None
    assert found > 40


def test_several_places_hold_different_tokens_longest_match_first():
    index = NgramIndex(1, 3, remember=3)
    index.extend([1, 2, 3, 7, 9, 2, 3, 8, 3, 6, 1, 2, 3])
    places = index.places()
    assert [index.tokens[place] for place in places] == [7, 8, 6]
    assert places == [3, 7, 9]


def test_an_index_remembers_no_more_than_asked():
    index = NgramIndex(1, 1, remember=2)
    index.extend([5, 1, 5, 2, 5, 3, 5])
    assert [index.tokens[place] for place in index.places()] == [3, 2]


def test_the_continuation_is_proposed():
    draft = NgramDraft(4)
    assert drafts(draft, [10, 11, 12, 13, 14, 15, 16, 10, 11]) == [12, 13, 14, 15]


def test_a_period_is_continued_past_the_end_of_the_text():
    assert drafts(NgramDraft(7), [9, 1, 2, 3, 1, 2, 3]) == [1, 2, 3, 1, 2, 3, 1]
    assert drafts(NgramDraft(5), [4, 4, 4]) == [4] * 5


def test_nothing_is_proposed_without_a_match_long_enough():
    assert drafts(NgramDraft(4, min_ngram=2), [1, 2, 3, 2]) == []
    assert drafts(NgramDraft(4, min_ngram=1), [1, 2, 3, 2]) == [3, 2, 3, 2]
    assert drafts(NgramDraft(4), [1]) == []


def test_no_more_is_proposed_than_the_request_can_use():
    text = [1, 2, 3, 4, 1, 2]
    draft = NgramDraft(4)
    assert drafts(draft, text, max_drafts=0) == []
    assert drafts(draft, text, max_drafts=2) == [3, 4]
    assert draft.propose([]).tokens.shape == (0, 0)


def test_requests_are_kept_apart_and_their_tokens_grow():
    draft = NgramDraft(2)
    first, second = [1, 2, 3, 1, 2], [1, 2, 9, 1, 2]
    proposal = draft.propose([request(first, id=1), request(second, id=2), request([7], id=3)])
    assert proposal.num_drafts.tolist() == [2, 2, 0]
    assert proposal.tokens[:2].tolist() == [[3, 1], [9, 1]]
    first += [5, 3, 1]
    assert drafts(draft, first, id=1) == [2, 5]  # "3 1" was followed by these


def test_a_released_request_is_forgotten():
    draft = NgramDraft(2)
    assert drafts(draft, [1, 2, 3, 1, 2], id=1) == [3, 1]
    draft.release(1)
    draft.release(1)
    draft.release(99)
    assert drafts(draft, [1, 2], id=1) == []  # another request with the id of the first


def test_a_long_text_costs_no_more_a_step_than_a_short_one():
    """Not a benchmark: a scan of the text would take a thousand times as long."""
    generator = random.Random(0)
    text = [generator.randrange(50_000) for _ in range(200_000)]
    draft = NgramDraft(4)
    draft.propose([request(text)])
    begun = time.perf_counter()
    for token in range(200):
        text.append(token)
        draft.propose([request(text)])
    assert (time.perf_counter() - begun) / 200 < 0.005


@pytest.mark.parametrize("wrong", [{"min_ngram": 0}, {"min_ngram": 5}, {"max_ngram": 1}])
def test_impossible_lengths_are_refused(wrong):
    with pytest.raises(ValueError, match="min_ngram <= max_ngram"):
        NgramDraft(4, **wrong)


@pytest.mark.parametrize("gamma", [0, -1])
def test_gamma_must_be_positive(gamma):
    with pytest.raises(ValueError, match="gamma must be at least 1"):
        NgramDraft(gamma)


@pytest.mark.parametrize("gamma", [2.0, True, None])
def test_gamma_must_be_a_number_or_adaptive(gamma):
    with pytest.raises(TypeError, match="gamma must be an int"):
        NgramDraft(gamma)


def test_ngrams_know_any_vocabulary_others_must_match():
    class Fixed(Draft):
        vocab_size, max_drafts = 100, 1

        def propose(self, requests):
            return Proposal.of([[0]] * len(requests))

    check_vocabulary(NgramDraft(2), 50)
    check_vocabulary(Fixed(), 100)
    with pytest.raises(ValueError, match=r"Fixed: .* 100 tokens, .* 50"):
        check_vocabulary(Fixed(), 50)
