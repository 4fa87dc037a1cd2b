"""Data-parallel calibration: two processes with half the data each, against one with all of it."""

import sys

import pytest
import torch
from torch import distributed as dist

import pumice
from tiny_lm import TinyLm

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

RECIPES = {
    "gptq": pumice.GPTQ(4, 16),
    "gptq-perm": pumice.GPTQ(3, 16, static_groups=False, symmetric=False),
    "awq": pumice.AWQ(4, 16, grid=10),
}


def data():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 50, (2, 9), generator=generator) for _ in range(7)]


def work(rank, folder, mode):
    """One process: its share of the data (the shares differ in size), its result on disk."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        share = data()[:4] if rank == 0 else data()[4:]
        for name, recipe in RECIPES.items():
            resume = f"{folder}/run-{name}" if mode == "resume" else None
            for _ in range(2 if resume else 1):
                result = pumice.compress(TinyLm(), recipe, share, resume=resume)
            torch.save(result.state_dict(), f"{folder}/{name}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["plain", "resume"])
def test_two_processes_give_the_weights_of_one(mode, tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path), mode), nprocs=2)
    for name, recipe in RECIPES.items():
        expected = pumice.compress(TinyLm(), recipe, data()).state_dict()
        for rank in (0, 1):
            state = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert state.keys() == expected.keys()
            for key, tensor in state.items():
                if tensor.is_floating_point() and "scales" not in key:
                    torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5)
                else:
                    assert torch.equal(tensor, expected[key]), (name, rank, key)


def test_one_process_alone_needs_no_group():
    assert not dist.is_initialized()
    assert "torch.distributed" in sys.modules
    pumice.compress(TinyLm(), RECIPES["gptq"], data())
