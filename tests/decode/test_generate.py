"""One call from prompts to texts, the stream, and the command."""

from __future__ import annotations

import gc
import importlib
import json

import numpy as np
import pytest
import torch
from engine_runs import greedy, prompt_of, random_params
from plain_models import PlainLm

import pumice
from pumice import cli
from pumice.decode import Engine, GenerationError, SamplingParams
from pumice.decode.draft_model import ModelDraft

pytest.importorskip("transformers")

from tiny_llama import make_model, make_tokenizer, save_folder


@pytest.fixture(scope="module")
def model():
    """Of bytes, with an embedding so lively that its text is not one character."""
    model = make_model(tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(30)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def engines(monkeypatch):
    """The engines that generate makes."""
    made = []

    class Noted(Engine):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(MODULE, "Engine", Noted)
    return made


# pumice.decode.generate is the function of that name.
MODULE = importlib.import_module("pumice.decode.generate")

TEXTS = ["Once upon a time", "naïve 日本", "x"]


def transformers_tokens(model, tokenizer, text, count):
    ids = tokenizer(text, return_tensors="pt").input_ids
    return model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[
        0, ids.shape[1] :
    ].tolist()


def test_texts_go_on_as_with_transformers(model, tokenizer):
    found = pumice.generate(model, TEXTS, tokenizer=tokenizer, max_new_tokens=20)
    assert [(one.prompt_index, one.index) for one in found] == [(0, 0), (1, 0), (2, 0)]
    for one, text in zip(found, TEXTS, strict=True):
        assert one.tokens == transformers_tokens(model, tokenizer, text, 20)
        assert one.text == tokenizer.decode(one.tokens)
        assert (one.finish_reason, one.stop, one.error, one.logprobs) == ("length", *[None] * 3)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda ids: [ids, ids]])
def test_prompts_may_be_token_ids(kind):
    found = pumice.generate(PlainLm(), kind([1, 2, 3]), max_new_tokens=4)
    assert {tuple(one.tokens) for one in found} == {
        tuple(pumice.generate(PlainLm(), [[1, 2, 3]], max_new_tokens=4)[0].tokens)
    }
    assert found[0].text is None
    assert len(pumice.generate(PlainLm(), torch.tensor([[1, 2], [3, 4]]), max_new_tokens=1)) == 2


def test_no_prompts_no_completions(model):
    assert pumice.generate(model, []) == []
    assert list(pumice.generate(model, [], stream=True)) == []


def test_the_stream_adds_up_to_the_completions(model, tokenizer):
    options = {"tokenizer": tokenizer, "max_new_tokens": 30, "n": 2, "seed": 3, "temperature": 0.9}
    texts: dict[tuple[int, int], str] = {}
    tokens: dict[tuple[int, int], list[int]] = {}
    for output in pumice.generate(model, TEXTS, stream=True, **options):
        key = output.id, output.index
        texts[key] = texts.get(key, "") + output.text
        tokens[key] = [*tokens.get(key, []), *output.tokens]
    whole = pumice.generate(model, TEXTS, **options)
    assert sorted(texts) == [(one.prompt_index, one.index) for one in whole]
    for one in whole:
        assert tokens[one.prompt_index, one.index] == one.tokens
        assert texts[one.prompt_index, one.index] == one.text
    assert len(set(texts.values())) == 6


def test_seeds_of_prompts_and_samples_are_all_different(model, tokenizer):
    whole = pumice.generate(model, TEXTS, tokenizer=tokenizer, n=2, seed=7, temperature=1.0)
    assert [one.seed for one in whole] == [7, 8, 9, 10, 11, 12]
    third = pumice.generate(model, TEXTS[1], tokenizer=tokenizer, seed=10, temperature=1.0)
    assert third[0].tokens == whole[3].tokens
    torch.manual_seed(1)
    first = pumice.generate(model, TEXTS[0], tokenizer=tokenizer, temperature=1.0)[0]
    again = pumice.generate(model, TEXTS[0], tokenizer=tokenizer, temperature=1.0, seed=first.seed)[
        0
    ]
    assert again.tokens == first.tokens


def test_stop_strings_end_the_text_before_them(model, tokenizer):
    whole = pumice.generate(
        model, TEXTS[0], tokenizer=tokenizer, max_new_tokens=60, temperature=1.2, seed=1
    )[0]
    characters = [c for c in whole.text if c != "\ufffd"]
    stop = "".join(characters[3:5])
    assert whole.text.count(stop)
    for stream in (False, True):
        found = pumice.generate(
            model, TEXTS[0], tokenizer=tokenizer, max_new_tokens=60, temperature=1.2, seed=1,
            stop=[stop, "never to be seen"], stream=stream,
        )  # fmt: skip
        outputs = list(found)
        assert "".join(one.text for one in outputs) == whole.text[: whole.text.index(stop)]
        assert (outputs[-1].finish_reason, outputs[-1].stop) == ("stop", stop)
        tokens = [token for one in outputs for token in one.tokens]
        assert tokens == whole.tokens[: len(tokens)]
        assert stop in tokenizer.decode(tokens)
        assert stop not in tokenizer.decode(tokens[:-1])


def test_parameters_for_each_prompt():
    params = [greedy(3), random_params(5, 1, logprobs=True)]
    first, second = pumice.generate(PlainLm(), [[1, 2], [3]], params=params)
    assert (len(first.tokens), first.logprobs) == (3, None)
    assert len(second.tokens) == len(second.logprobs) == 5
    with pytest.raises(ValueError, match="2 params were given for 1 prompts"):
        pumice.generate(PlainLm(), [[1]], params=params)


def test_closing_the_stream_ends_everything(model, tokenizer, engines):
    for close in (lambda stream: stream.close(), lambda stream: None):
        stream = pumice.generate(model, TEXTS, tokenizer=tokenizer, stream=True)
        for _ in range(5):
            next(stream)
        assert engines[-1].stats().cache.sequences == 3
        close(stream)
        del stream
        gc.collect()
        assert engines[-1].stats().cache.used_blocks == 0
        with pytest.raises(RuntimeError, match="closed"):
            engines[-1].step()


def test_the_engine_is_closed_after_an_error(model, engines):
    with pytest.raises(ValueError, match="token 256 at position 0"):
        pumice.generate(model, [[1], [256]])
    with pytest.raises(RuntimeError, match="closed"):
        engines[-1].step()


def test_the_cache_is_as_large_as_needed(model, engines):
    pumice.generate(model, [prompt_of(100)] * 3, max_new_tokens=28, n=2)
    stats = engines[-1].stats()
    assert stats.preemptions == 0
    assert 48 <= stats.cache.num_blocks <= 50
    pumice.generate(model, [prompt_of(3)], num_blocks=7)
    assert engines[-1].stats().cache.num_blocks == 7
    one = engines[0].runner.pool.nbytes // stats.cache.num_blocks
    pumice.generate(model, [prompt_of(3)], cache_bytes=9 * one)
    assert engines[-1].stats().cache.num_blocks == 9


def test_a_cache_of_limited_size_still_holds_the_longest(model, engines, monkeypatch):
    monkeypatch.setattr(MODULE, "CACHE_BYTES", 1)
    found = pumice.generate(model, [prompt_of(50), prompt_of(9)], max_new_tokens=20)
    assert [len(one.tokens) for one in found] == [20, 20]
    assert engines[-1].stats().cache.num_blocks <= 7


class Failing(PlainLm):
    def forward_paged(self, input_ids, positions, batch, rows):
        if (input_ids == 60).any():
            raise OSError("no such thing")
        return super().forward_paged(input_ids, positions, batch, rows)


def test_failures_are_raised_when_all_others_have_ended():
    with torch.no_grad():
        model = Failing()
        model.head.bias[60] = -100
    with pytest.raises(
        GenerationError,
        match="1 of 3 completions failed, the first of prompt 1: OSError: no such thing",
    ) as caught:
        pumice.generate(model, [[1, 2], [60], [3]], max_new_tokens=5)
    assert isinstance(caught.value.__cause__, OSError)
    first, second, third = caught.value.completions
    assert (len(first.tokens), len(second.tokens), len(third.tokens)) == (5, 0, 5)
    assert second.finish_reason == "error"


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ("text", {}, ValueError, "needs a tokenizer"),
        (5, {}, TypeError, "prompts must be a string, token ids, or a sequence"),
        ([[1], [1.0]], {}, TypeError, "integer token ids"),
        ([[1], []], {}, ValueError, "prompt is empty"),
        ([[1]], {"temperature": -1}, ValueError, "temperature"),
        ([[1]], {"stop": ["x"]}, ValueError, "needs a tokenizer"),
        ([[1]], {"max_batch": 3}, TypeError, "max_batch"),
    ],
)
def test_bad_calls_are_refused_at_once(prompts, options, error, message):
    for stream in (False, True):
        with pytest.raises(error, match=message):
            pumice.generate(PlainLm(), prompts, stream=stream, **options)


def test_the_model_is_left_as_it_was(model, tokenizer):
    implementation = model.config._attn_implementation
    model.train()
    pumice.generate(model, TEXTS, tokenizer=tokenizer, max_new_tokens=2)
    assert model.training
    model.eval()
    assert model.config._attn_implementation == implementation


# The command.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_folder(path)
    return path


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["generate", *map(str, arguments)])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


def test_the_command_streams_one_text(run, folder):
    model, tokenizer = make_model(), make_tokenizer()
    (expected,) = pumice.generate(model, "Hello", tokenizer=tokenizer, max_new_tokens=9)
    code, out, _ = run(folder, "--prompt", "Hello", "--max-new-tokens", 9)
    assert (code, out) == (0, f"{expected.text}\n")


def test_the_command_takes_several_prompts(run, folder):
    code, out, _ = run(
        folder, "--prompt", "Hello", "--prompt", "naïve", "--max-new-tokens", 5, "--n", 2,
        "--temperature", 0.8, "--seed", 3,
    )  # fmt: skip
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("---")] == [
        f"--- prompt {prompt}, sample {sample}" for prompt in (1, 2) for sample in (1, 2)
    ]


def test_the_command_gives_json(run, folder):
    code, out, _ = run(folder, "--prompt", "Hello", "--json", "--max-new-tokens", 5, "--seed", 2)
    assert code == 0
    (row,) = json.loads(out)
    assert (row["prompt"], len(row["tokens"]), row["seed"]) == ("Hello", 5, 2)
    assert row["finish_reason"] == "length"


def test_the_command_says_what_is_wrong(run, folder):
    code, _, err = run(folder, "--prompt", "Hello", "--max-new-tokens", 500)
    assert code == 1
    assert "the model takes 128" in err
    code, _, err = run(folder, "--prompt", "Hello", "--chat")
    assert code == 1
    assert "no chat template" in err


def test_a_draft_saves_passes_and_changes_no_token(model, tokenizer, engines):
    options = {"tokenizer": tokenizer, "max_new_tokens": 20}
    expected = pumice.generate(model, TEXTS, **options)
    found = pumice.generate(model, TEXTS, draft=ModelDraft(model, 3), **options)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert engines[-1].stats().passes < engines[0].stats().passes / 3
    assert engines[-1].stats().accepted > 40


def test_params_are_as_given():
    params = SamplingParams(3, temperature=1.0, seed=5)
    first, second = pumice.generate(PlainLm(), [[1, 2], [1, 2]], params=params)
    assert first.tokens == second.tokens
    assert first.seed == second.seed == 5
