"""A small model to save, and how to compare what comes back."""

from pathlib import Path

import torch
from torch import nn

import pumice

X = torch.linspace(-3, 3, 4 * 12).reshape(4, 12)


def make_model(dtype: torch.dtype = torch.float32, device: str | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    with torch.device(device or "cpu"):
        model = nn.Sequential(
            nn.Linear(12, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 6, bias=False)
        )
    return model.to(dtype)


def save_model(folder: Path, recipe=None, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = pumice.compress(
        make_model(dtype), recipe or pumice.LLMInt8(threshold=2.0), [X.to(dtype)]
    )
    pumice.save(model, folder)
    return model


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    state, other_state = model.state_dict(), other.state_dict()
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other_state[name].dtype, name
        assert torch.equal(tensor, other_state[name]), name
