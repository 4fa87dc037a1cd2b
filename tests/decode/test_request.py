"""What a request may be, and the text that comes out of tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pumice.decode.output import TextStream
from pumice.decode.request import MAX_SEED, SamplingParams, check_prompt


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, r"max_new_tokens must be in \[1, "),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an integer, not 2.0"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens must be an integer, not True"),
        ({"temperature": -1}, ValueError, r"temperature must be a number in \[0, inf\], not -1"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a number"),
        ({"temperature": float("inf")}, ValueError, "temperature must be a number"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, not 'hot'"),
        ({"top_k": -1}, ValueError, "top_k must be in"),
        ({"top_p": 0}, ValueError, "top_p must be above 0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be a number in \[0, 1\], not 1.5"),
        ({"min_p": 2}, ValueError, r"min_p must be a number in \[0, 1\], not 2"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": MAX_SEED, "n": 2}, ValueError, "seed must be in"),
        ({"n": 0}, ValueError, "n must be in"),
        ({"stop_token_ids": [-1]}, ValueError, "a token of stop_token_ids must be in"),
        ({"stop_token_ids": 5}, TypeError, "stop_token_ids must be a sequence"),
        ({"stop_token_ids": "ab"}, TypeError, "stop_token_ids must be a sequence"),
        ({"stop": [""]}, ValueError, "empty string"),
        ({"stop": [5]}, TypeError, r"single tokens: stop_token_ids"),
        ({"stop": 5}, TypeError, "stop must be strings or sequences"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos must be True or False, not 1"),
    ],
)
def test_parameters_out_of_range_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**values)


def test_parameters_take_lists():
    params = SamplingParams(stop_token_ids=[3], stop=["ab", [1, 2]])
    assert params.stop_token_ids == (3,)
    assert params.stop_strings == ("ab",)
    assert params.stop_sequences == ((1, 2),)
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams().greedy


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "prompt is empty"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "prompt is empty"),
        ([1.0], TypeError, r"vector of integer token ids, not float64 of shape \[1\]"),
        ([True], TypeError, "not bool"),
        ([[1, 2]], TypeError, r"of shape \[1, 2\]"),
        (3, TypeError, r"of shape \[\]"),
        ("text", TypeError, "vector of integer token ids"),
        ([1, [2]], TypeError, "must be a vector of token ids"),
        ([2**70], TypeError, "vector of"),
        ([1, 61], ValueError, "token 61 at position 1 is not one of the model's vocabulary of 61"),
        ([-1], ValueError, "token -1 at position 0"),
    ],
)
def test_prompts_that_are_none_are_refused(prompt, error, message):
    with pytest.raises(error, match=message):
        check_prompt(prompt, 61)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, np.uint16])
def test_prompts_come_as_lists_arrays_and_tensors(kind):
    ids = check_prompt(kind([3, 60]), 61)
    assert ids.tolist() == [3, 60]
    assert ids.dtype == np.int32


# Text. The tokenizer has a token for each byte, so that characters come in pieces.


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    from tiny_llama import make_tokenizer

    return make_tokenizer()


TEXT = "naïve 日本語, 👩‍👩‍👧 done\n"


def pieces(stream, tokens):
    return [stream.add([token]) for token in tokens]


def test_pieces_are_characters_and_make_up_the_text(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer(TEXT).input_ids
    assert len(ids) == len(TEXT.encode())
    found = pieces(stream, ids)
    assert "".join(found) == TEXT
    assert stream.finish() == ""
    assert max(map(len, found)) == 1
    assert "\ufffd" not in "".join(found)


def test_tokens_in_any_portions_give_the_same_text(tokenizer):
    ids = tokenizer(TEXT * 3).input_ids
    for seed in range(20):
        chance, stream, rest, text = random.Random(seed), TextStream(tokenizer), list(ids), ""
        while rest:
            size = chance.randint(1, 7)
            text += stream.add(rest[:size])
            rest = rest[size:]
        assert text + stream.finish() == TEXT * 3


def test_the_end_of_a_prompt_may_be_half_a_character(tokenizer):
    ids = tokenizer("日本").input_ids
    stream = TextStream(tokenizer, context=ids[:4])
    assert "".join(pieces(stream, ids[4:])) + stream.finish() == "本"


def test_what_never_becomes_a_character_comes_in_the_end(tokenizer):
    ids = tokenizer("日").input_ids
    stream = TextStream(tokenizer)
    assert pieces(stream, ids[:2]) == ["", ""]
    assert stream.finish() == tokenizer.decode(ids[:2]) == "\ufffd"


def test_bytes_that_are_no_text_do_not_hold_everything_back(tokenizer):
    lead = tokenizer("日").input_ids[:1]
    ids = lead * 10 + tokenizer("ok").input_ids
    stream = TextStream(tokenizer)
    found = pieces(stream, ids)
    assert len("".join(found[:10])) == 10 - 3
    assert "".join(found) + stream.finish() == tokenizer.decode(ids)


def test_special_tokens_are_no_text(tokenizer):
    class WithEos:
        def decode(self, tokens, **options):
            assert options["skip_special_tokens"]
            return tokenizer.decode([token for token in tokens if token != 999], **options)

    stream = TextStream(WithEos())
    assert "".join(pieces(stream, [*tokenizer("a b").input_ids, 999])) == "a b"


def test_decoders_that_strip_the_first_space_lose_none_on_the_way():
    """As SentencePiece's: the first token's leading space is not part of the text."""

    class Words:
        def decode(self, tokens, **_):
            return (
                "".join(["▁a", "▁b", "c", "▁"][token] for token in tokens)
                .replace("▁", " ")
                .removeprefix(" ")
            )

    for tokens in ([0, 1, 2, 1], [3, 3, 0, 3, 1], [0, 3, 3, 3, 2]):
        stream = TextStream(Words())
        assert "".join(pieces(stream, tokens)) + stream.finish() == Words().decode(tokens)
    stream = TextStream(Words(), context=[0])
    assert "".join(pieces(stream, [1, 2])) == " bc"


def test_stop_strings_are_found_across_tokens_and_not_given_out(tokenizer):
    stream = TextStream(tokenizer, ["STOP", "XY"])
    found = pieces(stream, tokenizer("one STO STOP two").input_ids)
    assert "".join(found) == "one STO "
    assert stream.stopped_by == "STOP"
    assert stream.add(tokenizer("more").input_ids) == stream.finish() == ""


def test_what_might_become_a_stop_string_is_held_back(tokenizer):
    stream = TextStream(tokenizer, ["aab"])
    assert pieces(stream, tokenizer("aaac").input_ids) == ["", "", "a", "aac"]
    assert pieces(stream, tokenizer("aa").input_ids) == ["", ""]
    assert stream.finish() == "aa"
    assert stream.stopped_by is None


def test_the_first_of_several_stop_strings_counts(tokenizer):
    stream = TextStream(tokenizer, ["cd", "bcde"])
    assert stream.add(tokenizer("abcdef").input_ids) == "a"
    assert stream.stopped_by == "bcde"


def test_stop_strings_of_characters_of_several_bytes(tokenizer):
    stream = TextStream(tokenizer, ["本"])
    assert "".join(pieces(stream, tokenizer("日本語").input_ids)) == "日"
    assert stream.stopped_by == "本"
