"""A language model small enough to test on, with the parts that matter."""

import torch
from torch import nn

import pumice


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class TinyLm(nn.Module):
    """The parts that matter: an embedding, blocks, an output layer, tied on request."""

    def __init__(self, *, width: int = 24, vocabulary: int = 50, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.embed(ids) * scale
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


IDS = torch.arange(14).reshape(2, 7)
BLOCK_LINEARS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def types(model: nn.Module) -> dict[str, type]:
    return {
        name: type(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, pumice.nn.CompressedLinear))
    }


def compressed(model: nn.Module) -> list[str]:
    return [name for name, kind in types(model).items() if kind is not nn.Linear]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
