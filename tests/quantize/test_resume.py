"""Interrupted runs: finished blocks are found again, and the result is the same to the bit."""

import json
import pathlib

import pytest
import torch

import pumice
from pumice.calibration import Block
from tiny_lm import IDS, TinyLm, assert_unchanged, compressed, state_of
from tiny_transformers import build, samples

pytest.importorskip("safetensors")
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


class KilledError(Exception):
    pass


def killed_in_block(monkeypatch, name):
    """Let the run die when it comes to that block; returns what revives it."""
    original = Block.collect

    def collect(self, make):
        if self.name == name:
            raise KilledError
        return original(self, make)

    monkeypatch.setattr(Block, "collect", collect)
    return lambda: monkeypatch.setattr(Block, "collect", original)


@pytest.mark.parametrize(
    "recipe",
    [pumice.GPTQ(4, 32, static_groups=False, symmetric=False), pumice.AWQ(4, 32, grid=4)],
    ids=lambda recipe: recipe.name,
)
def test_a_killed_run_goes_on_with_the_same_result(recipe, tmp_path, monkeypatch):
    model, data = build("qwen2"), samples(2)
    before = state_of(model)
    expected = pumice.compress(model, recipe, data)
    folder = tmp_path / "run"
    revive = killed_in_block(monkeypatch, "model.layers.1")
    with pytest.raises(KilledError):
        pumice.compress(model, recipe, data, resume=folder)
    assert_unchanged(model, before)
    assert sorted(p.name for p in folder.iterdir()) == ["block-0000.safetensors", "run.json"]
    revive()
    collected = []
    collect = Block.collect
    monkeypatch.setattr(
        Block, "collect", lambda self, make: (collected.append(self.name), collect(self, make))[1]
    )
    seen = []
    resumed = pumice.compress(
        model, recipe, data, resume=folder, progress=lambda *args: seen.append(args)
    )
    assert set(collected) == {"model.layers.1"}  # the first block is not calibrated again
    assert [done for done, _, _ in seen] == list(range(1, 15))
    state = expected.state_dict()
    assert resumed.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in resumed.state_dict().items())
    assert pumice.report(resumed) == pumice.report(expected)
    # A third time there is nothing left to do.
    collected.clear()
    again = pumice.compress(model, recipe, data, resume=folder)
    assert not collected
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


def finished_run(folder):
    model = TinyLm()
    pumice.compress(model, pumice.GPTQ(4, 16), [IDS] * 4, resume=folder)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: (m, pumice.GPTQ(3, 16), [IDS] * 4, {}), "another run.*differs in recipes"),
        (lambda m: (m, pumice.GPTQ(4, 16), [IDS] * 5, {}), "differs in calibration"),
        (lambda m: (m, pumice.GPTQ(4, 16), [IDS + 1] * 4, {}), "differs in calibration"),
        (lambda m: (m, pumice.GPTQ(4, 16), [IDS] * 4, {"include": "up"}), "differs in layers"),
    ],
)
def test_another_run_is_not_continued(change, message, tmp_path):
    model, recipe, data, options = change(finished_run(tmp_path))
    with pytest.raises(ValueError, match=message):
        pumice.compress(model, recipe, data, resume=tmp_path, **options)


def test_other_weights_are_noticed(tmp_path):
    model = finished_run(tmp_path)
    with torch.no_grad():
        model.blocks[1].down.weight[0, 0] += 1e-4
    with pytest.raises(ValueError, match=r"made from other weights than .*'blocks\.1'"):
        pumice.compress(model, pumice.GPTQ(4, 16), [IDS] * 4, resume=tmp_path)


def test_a_broken_file_is_named(tmp_path):
    model = finished_run(tmp_path)
    path = tmp_path / "block-0001.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"block-0001\.safetensors is not a finished block"):
        pumice.compress(model, pumice.GPTQ(4, 16), [IDS] * 4, resume=tmp_path)


def test_a_block_half_written_does_not_count(tmp_path, monkeypatch):
    """Dying while a file is written leaves no file of its final name."""
    model = TinyLm()

    def fail(self, target):
        if "block" in self.name:
            raise KilledError
        return original(self, target)

    original = pathlib.Path.replace
    monkeypatch.setattr(pathlib.Path, "replace", fail)
    with pytest.raises(KilledError):
        pumice.compress(model, pumice.GPTQ(4, 16), [IDS] * 4, resume=tmp_path)
    monkeypatch.setattr(pathlib.Path, "replace", original)
    assert not list(tmp_path.glob("block*.safetensors"))
    result = pumice.compress(model, pumice.GPTQ(4, 16), [IDS] * 4, resume=tmp_path)
    assert len(compressed(result)) == 4
    assert json.loads((tmp_path / "run.json").read_text())["blocks"] == ["blocks.0", "blocks.1"]
