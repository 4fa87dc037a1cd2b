"""Interrupted and data-parallel runs of pruning methods give the same weights."""

import dataclasses

import pytest
import torch
from torch import distributed as dist

import pumice
from pumice.calibration import Block
from pumice.prune import prune_and_tune
from tiny_lm import IDS, TinyLm, assert_unchanged, state_of
from tiny_transformers import build, samples

pytest.importorskip("safetensors")

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")

RECIPES = [
    pumice.Wanda(0.6),
    pumice.SparseGPT(0.6),
    pumice.SparseGPT(pattern="2:4"),
    pumice.SparseGPT(pattern="2:4", bits=4, group_size=32, symmetric=False),
]


class KilledError(Exception):
    pass


def assert_same(model, other):
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert pumice.report(model) == pumice.report(other)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_killed_run_goes_on_with_the_same_result(recipe, tmp_path, monkeypatch):
    model, data = build("qwen2"), samples(2)
    before = state_of(model)
    expected = pumice.compress(model, recipe, data)
    original = Block.collect

    def collect(self, make):
        if self.name == "model.layers.1":
            raise KilledError
        return original(self, make)

    monkeypatch.setattr(Block, "collect", collect)
    with pytest.raises(KilledError):
        pumice.compress(model, recipe, data, resume=tmp_path)
    assert_unchanged(model, before)
    monkeypatch.setattr(Block, "collect", original)
    resumed = pumice.compress(model, recipe, data, resume=tmp_path)
    assert_same(resumed, expected)
    monkeypatch.setattr(Block, "collect", collect)  # nothing is left to collect
    monkeypatch.setattr(Block, "name", "model.layers.1", raising=False)
    assert_same(pumice.compress(model, recipe, data, resume=tmp_path), expected)


def test_a_run_of_another_ratio_is_not_continued(tmp_path):
    pumice.compress(TinyLm(), pumice.Wanda(0.5), [IDS] * 4, resume=tmp_path)
    with pytest.raises(ValueError, match=r"another run.*differs in recipes"):
        pumice.compress(TinyLm(), pumice.Wanda(0.6), [IDS] * 4, resume=tmp_path)


TUNING = pumice.PruneAndTune(0.7, rounds=3, steps=3, batch=2, learning_rate=1e-3)


def test_finished_rounds_are_not_tuned_again(tmp_path, monkeypatch):
    data = [IDS, IDS + 3, IDS * 2]
    expected = pumice.compress(TinyLm(), TUNING, data)
    original, calls = prune_and_tune.tune, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KilledError
        return original(*args, **kwargs)

    monkeypatch.setattr(prune_and_tune, "tune", dying)
    with pytest.raises(KilledError):
        pumice.compress(TinyLm(), TUNING, data, resume=tmp_path)
    calls.clear()
    monkeypatch.setattr(
        prune_and_tune, "tune", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    resumed = pumice.compress(TinyLm(), TUNING, data, resume=tmp_path)
    assert len(calls) == 2
    assert_same(resumed, expected)


def test_rounds_of_another_run_are_not_continued(tmp_path):
    pumice.compress(TinyLm(), TUNING, [IDS] * 2, resume=tmp_path)
    longer = dataclasses.replace(TUNING, steps=4)
    unlike = TinyLm()
    unlike.embed.weight.data[0, 0] += 1.0
    for model, recipe, data in (
        (TinyLm(), longer, [IDS] * 2),
        (unlike, TUNING, [IDS] * 2),
        (TinyLm(), TUNING, [IDS, IDS + 1]),
        (TinyLm(), TUNING, [{"ids": IDS}, {"ids": IDS[:, :-1]}]),
    ):
        with pytest.raises(ValueError, match=r"tuned\.safetensors is of another run"):
            pumice.compress(model, recipe, data, resume=tmp_path)
    path = tmp_path / "round-00" / "tuned.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"tuned\.safetensors is not a finished round"):
        pumice.compress(TinyLm(), TUNING, [IDS] * 2, resume=tmp_path)


def share_of(rank):
    generator = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 50, (2, 9), generator=generator) for _ in range(7)]
    return {None: data, 0: data[:4], 1: data[4:]}[rank]


def work(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        for index, recipe in enumerate(RECIPES):
            result = pumice.compress(TinyLm(), recipe, share_of(rank))
            torch.save(result.state_dict(), f"{folder}/{index}-{rank}.pt")
        with pytest.raises(ValueError, match="in one process"):
            pumice.compress(TinyLm(), TUNING, share_of(rank))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_processes_give_the_weights_of_one(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    for index, recipe in enumerate(RECIPES):
        expected = pumice.compress(TinyLm(), recipe, share_of(None)).state_dict()
        for rank in (0, 1):
            state = torch.load(tmp_path / f"{index}-{rank}.pt")
            assert state.keys() == expected.keys()
            for key, tensor in state.items():
                if tensor.is_floating_point():
                    torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4)
                else:
                    assert torch.equal(tensor, expected[key]), (recipe, rank, key)
