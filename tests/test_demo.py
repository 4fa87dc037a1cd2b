"""The demo: its verdict and outputs on made-up numbers, and all of it on a tiny model."""

import json
import math

import pytest
import torch
from rich.console import Console

from demo import __main__ as everything
from demo import compare, compression, picture, results
from demo.methods import LLM_INT8, METHODS, NAIVE, UNCOMPRESSED
from pumice.evaluate import Perplexity, Throughput
from tiny_llama import make_model, make_tokenizer


def quality(value: float) -> Perplexity:
    nll = math.log(value) if value == value else math.nan
    return Perplexity(value, nll, (nll - 0.1, nll + 0.1), 512, 1022)


def rows_of(naive: float = 49.2, mixed: float = 22.3) -> dict[str, results.Row]:
    values = {UNCOMPRESSED.name: 22.0, NAIVE.name: naive, LLM_INT8.name: mixed}
    return {
        method.name: results.Row(
            method,
            quality(values.get(method.name, 22.6)),
            538_000_000 if method is UNCOMPRESSED else 220_000_000,
            [Throughput(speed, speed / 20, (speed,), (speed / 20,), 512, 24) for speed in speeds],
        )
        for method, speeds in zip(METHODS, [(90.0, 100.0, 500.0)] + [(150.0,)] * 9, strict=False)
    }


@pytest.mark.parametrize(
    ("naive", "mixed", "holds"),
    [
        (49.2, 22.3, [True, True]),
        (22.5, 22.3, [False, True]),
        (49.2, 22.5, [True, False]),
        (49.2, 20.0, [True, False]),  # better than uncompressed by that much: something is wrong
        (math.nan, 22.3, [False, True]),
        (49.2, math.nan, [True, False]),
    ],
)
def test_verdict(naive, mixed, holds):
    assert [ok for _, ok in results.verdict(rows_of(naive, mixed))] == holds


def test_every_number_stands_beside_the_uncompressed_one():
    console = Console(width=80)
    with console.capture() as captured:
        console.print(results.table(rows_of()))
    lines = captured.get().splitlines()
    mixed = next(line for line in lines if LLM_INT8.label in line)
    assert mixed.split()[-8:] == ["22.30", "+1.4%", "220", "41%", "150", "×1.50", "7.5", "×1.50"]
    naive = next(line for line in lines if NAIVE.label in line)
    assert naive.split()[-8:-6] == ["49.20", "+124%"]
    assert "…" not in captured.get()  # it fits a terminal of 80 columns


def test_results_are_stored_whole(tmp_path):
    rows = rows_of()
    results.store(tmp_path / "r.json", rows, {"model": "m"})
    stored = json.loads((tmp_path / "r.json").read_text())
    assert [row["method"] for row in stored["rows"]] == [method.name for method in METHODS]
    base = stored["rows"][0]
    assert base["recipe"] is None
    assert base["prefill_tokens_per_second"] == 100.0  # the median
    assert len(base["rounds"]) == 3
    recipes = {row["method"]: row["recipe"] for row in stored["rows"]}
    assert recipes[LLM_INT8.name]["name"] == "llm_int8"
    assert all(entry["holds"] for entry in stored["verdict"])


def test_the_picture_is_drawn_with_every_method(tmp_path):
    picture.draw(tmp_path / "p.svg", rows_of(), "caption")
    picture.draw(tmp_path / "p.png", rows_of(), "caption")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    svg = (tmp_path / "p.svg").read_text()
    for text in ["caption", "size of the model (MB)", *(method.label for method in METHODS)]:
        assert text in svg


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The demo with a model and texts that need no download and no minutes."""
    monkeypatch.setattr(compare, "load_model", lambda *_, **__: (make_model(), make_tokenizer()))
    monkeypatch.setattr(compare, "load_text", lambda *_, **__: "Some text to read. " * 100)
    monkeypatch.setattr(compression, "SIZES", {"context": 64, "prefill": 32, "decode": 2})
    return tmp_path / "out"


def test_the_demo_from_end_to_end(tiny, capsys):
    """A random model has no outliers, so nothing falls apart: the demo must say so and fail."""
    assert compression.main(["--windows", "3", "--out", str(tiny)]) == 1
    printed = capsys.readouterr()
    assert "NO   naive int8 falls apart" in printed.out
    assert f"yes  {LLM_INT8.label}, keeps the model" in printed.out
    assert all(method.label in printed.out for method in METHODS)
    assert "2 × down_proj" in printed.out
    assert 'attn_implementation="pumice" in place of "sdpa": the same 24 tokens' in (
        " ".join(printed.out.split())
    )
    assert "perplexity: uncompressed" in printed.err  # the progress bars
    stored = json.loads((tiny / "results.json").read_text())
    assert stored["setting"]["tokens"] == 3 * 63
    assert stored["setting"]["torch"] == torch.__version__
    assert (tiny / "perplexity.png").exists()


def test_the_demo_succeeds_where_the_claims_hold(tiny, monkeypatch):
    monkeypatch.setattr(results, "NAIVE_IS_WORSE_BY", 0.5)
    assert compression.main(["--windows", "3", "--out", str(tiny)]) == 0


def test_the_parts_run_in_turn_and_one_that_fails_stops_nothing(monkeypatch, capsys):
    ran = []

    def part(name, code):
        return lambda arguments: ran.append((name, list(arguments))) or code

    parts = {"first": part("first", 0), "second": part("second", 1), "third": part("third", 0)}
    monkeypatch.setattr(everything, "PARTS", parts)
    assert everything.main([]) == 1
    assert ran == [("first", []), ("second", []), ("third", [])]
    assert "second" in capsys.readouterr().out
    assert everything.main(["third", "--threads", "1"]) == 0
    assert ran[-1] == ("third", ["--threads", "1"])
    with pytest.raises(SystemExit):
        everything.main(["fourth"])
