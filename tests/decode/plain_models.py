"""A transformer in plain torch that runs over a paged cache by forward_paged."""

from __future__ import annotations

import torch
from torch import nn


class PlainLm(nn.Module):
    """One layer a block, value dim unlike key dim, rotated pairs that lie side by side."""

    def __init__(self, *, layers=2, width=32, heads=4, kv_heads=2, dim=8, value_dim=12) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.heads, self.kv_heads, self.dim, self.value_dim = heads, kv_heads, dim, value_dim
        self.embed = nn.Embedding(61, width)
        self.qkv = nn.ModuleList(
            nn.Linear(width, heads * dim + kv_heads * (dim + value_dim)) for _ in range(layers)
        )
        self.out = nn.ModuleList(nn.Linear(heads * value_dim, width) for _ in range(layers))
        self.head = nn.Linear(width, 61)
        self.register_buffer("inv_freq", 1 / 100 ** (torch.arange(dim // 2) / (dim // 2)))
        with torch.no_grad():
            for layer in self.qkv:
                layer.weight.mul_(4)

    def rotate(self, states, positions):
        angles = (positions[:, None] * self.inv_freq)[:, None]
        a, b = states[..., 0::2], states[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    def project(self, layer, x, positions):
        sizes = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.value_dim]
        q, k, v = layer(x).split(sizes, -1)
        q, k = (self.rotate(t.unflatten(-1, (-1, self.dim)), positions) for t in (q, k))
        return q, k, v.unflatten(-1, (-1, self.value_dim))

    def forward_paged(self, input_ids, positions, batch, rows):
        x = self.embed(input_ids)
        for index, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = self.project(qkv, x, positions)
            x = x + out(batch.attend(index, q, k, v).flatten(1))
        return self.head(x if rows is None else x[rows])

    @torch.no_grad()
    def alone(self, tokens):
        """The logits [n, V] of one sequence, by an attention of its own."""
        x, positions = self.embed(torch.tensor(tokens)), torch.arange(len(tokens))
        hidden = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = self.project(qkv, x, positions)
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.dim**-0.5
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            x = x + out(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        return self.head(x)
