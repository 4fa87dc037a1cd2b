"""The sampling operators under torch.compile, on meta tensors and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pumice
from backends import Backend


def test_opcheck(backend: Backend) -> None:
    device = backend.device
    x = torch.randn(3, 40, device=device)
    t, k = torch.full((3,), 0.7, device=device), torch.full((1,), 5, device=device).int()
    u, i = torch.rand(3, device=device), torch.arange(3, device=device)
    ops = backend.ops
    for logits in (x, x.half()):
        torch.library.opcheck(ops.sampling_probs.default, (logits, t, k, None, t))
        torch.library.opcheck(ops.sample.default, (logits, t, k, t, None, u, None, None))
        torch.library.opcheck(ops.sample.default, (logits, None, None, None, None, None, i, i))
    drafts = torch.zeros(3, 2, dtype=torch.int64, device=device)
    target, draft = (torch.rand(3, n, 40, device=device) for n in (3, 2))
    for probs, counts in ((None, None), (draft, i.int())):
        args = (drafts, counts, probs, target, None, i, i)
        torch.library.opcheck(ops.speculative_verify.default, args)
        tree = (drafts, drafts.int() - 1, probs, target, None, i, i)
        torch.library.opcheck(ops.speculative_verify_tree.default, tree)


def step(logits: Tensor, drafts: Tensor, seeds: Tensor, positions: Tensor) -> list[Tensor]:
    """Drafts verified against logits [B, N + 1, V]; then a sample of the last row."""
    probs = pumice.ops.sampling_probs(logits.flatten(0, 1), temperature=0.8, top_k=20, top_p=0.9)
    chain = pumice.ops.speculative_verify(
        drafts, probs.view_as(logits), seeds=seeds, positions=positions
    )
    parents = torch.full_like(drafts, -1, dtype=torch.int32)
    tree = pumice.ops.speculative_verify_tree(
        drafts, parents, probs.view_as(logits), seeds=seeds, positions=positions
    )
    drawn = pumice.ops.sample(logits[:, -1], min_p=0.1, seeds=seeds, positions=positions)
    return [*chain, *tree, *drawn]


def tensors_of(batch: int, drafts: int, device: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(batch)
    logits = torch.randn(batch, drafts + 1, 60, generator=g) * 2
    tokens = logits[:, :drafts].argmax(-1)
    seeds = torch.arange(batch)
    return [x.to(device) for x in (logits, tokens, seeds, seeds + 5)]


def test_compiles(backend: Backend) -> None:
    compiled = backend.compile(step)
    for batch, drafts in ((2, 3), (3, 3), (5, 2)):
        tensors = tensors_of(batch, drafts, backend.device)
        for ours, expected in zip(compiled(*tensors), step(*tensors), strict=True):
            assert torch.equal(ours, expected)


def test_compiles_without_numbers(backend: Backend) -> None:
    """torch.rand is part of the graph."""
    compiled = backend.compile(lambda x: pumice.ops.sample(x, top_k=3))
    for rows in (2, 4):
        tokens, logprobs = compiled(torch.randn(rows, 9, device=backend.device))
        assert tokens.shape == logprobs.shape == (rows,)


def test_meta_tensors() -> None:
    x = torch.empty(3, 7, device="meta", dtype=torch.bfloat16)
    probs = pumice.ops.sampling_probs(x, top_k=2)
    assert (probs.shape, probs.dtype, probs.device.type) == ((3, 7), torch.float32, "meta")
    tokens, logprobs = pumice.ops.sample(x)
    assert (tokens.shape, tokens.dtype) == ((3,), torch.int64)
    assert (logprobs.shape, logprobs.dtype) == ((3,), torch.float32)
    drafts = torch.empty(3, 4, device="meta", dtype=torch.int64)
    target = torch.empty(3, 5, 7, device="meta")
    tokens, accepted = pumice.ops.speculative_verify(drafts, target)
    assert (tokens.shape, tokens.dtype) == ((3, 5), torch.int64)
    assert (accepted.shape, accepted.dtype) == ((3,), torch.int32)
    tokens, path, accepted = pumice.ops.speculative_verify_tree(drafts, drafts.int(), target)
    assert (tokens.shape, path.shape, accepted.shape) == ((3, 5), (3, 4), (3,))
    assert path.dtype == torch.int32


def test_cuda_graph(backend: Backend) -> None:
    """Captured once, replayed on other logits and seeds."""
    if backend.name != "cuda":
        pytest.skip("CUDA graphs")
    tensors, others = tensors_of(5, 3, "cuda"), tensors_of(5, 3, "cuda")
    others[0] = others[0].flip(0)
    others[2] = others[2] + 100
    step(*tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(*tensors)
    for x, other in zip(tensors, others, strict=True):
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for ours, expected in zip(result, step(*others), strict=True):
        assert torch.equal(ours, expected)
