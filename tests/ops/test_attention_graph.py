"""The attention operators under autograd, torch.compile, export and CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attention_reference as reference
import pumice
from attention_cases import AttentionCase, inputs, offsets
from backends import Backend

SIZES = {"queries": 9, "keys": 13, "heads": 4, "kv_heads": 2, "dim": 8, "value_dim": 6}


def dense(backend: Backend, **changed: Any) -> tuple[list[Tensor], dict[str, Any]]:
    given = inputs(AttentionCase(**(SIZES | changed)))
    operands = [torch.stack(tensors) for tensors in zip(*given.sequences, strict=True)]
    keywords = {
        k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in given.keywords.items()
    }
    return [x.to(backend.device) for x in operands], keywords


def weights(x: Tensor) -> Tensor:
    """Different ones for each element, so that no gradient cancels."""
    return torch.linspace(-1, 1, x.numel(), device=x.device, dtype=torch.float64).view_as(x)


@pytest.mark.parametrize("used", ["out", "lse", "both"])
@pytest.mark.parametrize("mask", ["full", "causal", "global"])
def test_gradients_of_out_and_lse(backend: Backend, mask: str, used: str) -> None:
    """All gradients, that of the sinks too, against autograd through the oracle. Some queries see
    nothing but the sink: there are more of them than keys."""
    case = AttentionCase(**(SIZES | {"queries": 16, "mask": mask, "sinks": True, "softcap": 4.0}))
    given = inputs(case)
    gradients = []
    for exactly in (False, True):
        leaves = [torch.stack(tensors) for tensors in zip(*given.sequences, strict=True)]
        leaves.append(given.sinks)  # type: ignore[arg-type]
        if exactly:
            leaves = [x.detach().double().requires_grad_() for x in leaves]
            out, lse = reference.attention(*leaves[:3], given.options[0], sinks=leaves[3])
        else:
            leaves = [x.clone().to(backend.device).requires_grad_() for x in leaves]
            out, lse = pumice.ops.flash_attention(
                *leaves[:3], **given.keywords | {"sinks": leaves[3]}, return_lse=True
            )
        loss = (out * weights(out)).sum() if used != "lse" else 0.0
        if used != "out":
            loss = loss + (lse * weights(lse)).sum()
        loss.backward()  # type: ignore[union-attr]
        gradients.append([x.grad for x in leaves])
    for actual, exact in zip(*gradients, strict=True):
        if exact is None:  # the lse does not depend on value
            assert not actual.any()
            continue
        torch.testing.assert_close(actual.cpu().double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_16_bit(backend: Backend, dtype: torch.dtype) -> None:
    """In the operands' dtypes; those of 16-bit sinks too."""
    operands, keywords = dense(backend, dtype=dtype, mask="causal", sinks=True)
    sinks = keywords["sinks"].to(dtype).requires_grad_()
    leaves = [x.requires_grad_() for x in operands]
    out = pumice.ops.flash_attention(*leaves, **keywords | {"sinks": sinks})
    (out * weights(out)).sum().backward()
    exact = [x.detach().cpu().double().requires_grad_() for x in (*leaves, sinks)]
    options = reference.Options(causal=True)
    exact_out, _ = reference.attention(*exact[:3], options, sinks=exact[3])
    (exact_out * weights(exact_out)).sum().backward()
    for leaf, wanted in zip((*leaves, sinks), exact, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        error = (leaf.grad.cpu().double() - wanted.grad).abs().max()  # type: ignore[operator]
        assert error <= 0.02 * wanted.grad.abs().max()  # type: ignore[union-attr]


def test_gradients_of_packed_sequences(backend: Backend) -> None:
    """Those of each sequence alone; none for rows that no sequence has."""
    g = torch.Generator().manual_seed(0)
    q_lengths, k_lengths = [5, 0, 9, 1], [7, 3, 4, 0]
    q = torch.randn(sum(q_lengths) + 5, 4, 8, generator=g).to(backend.device)
    k = torch.randn(sum(k_lengths) + 5, 2, 8, generator=g).to(backend.device)
    v = torch.randn(sum(k_lengths) + 5, 2, 6, generator=g).to(backend.device)
    sinks = torch.randn(4, generator=g).to(backend.device).requires_grad_()
    for x in (q, k, v):
        x[:2], x[-3:] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = pumice.ops.flash_attention_varlen(
        *leaves,
        offsets(q_lengths, 2).to(backend.device),
        offsets(k_lengths, 2).to(backend.device),
        max_seqlen_q=9,
        max_seqlen_k=7,
        causal=True,
        sinks=sinks,
        return_lse=True,
    )
    scale = weights(out)
    ((out * scale).sum() + lse[:, 2:-3].sum()).backward()
    expected = [torch.zeros_like(x) for x in (*leaves, sinks)]
    begin_q, begin_k = 2, 2
    for q_length, k_length in zip(q_lengths, k_lengths, strict=True):
        rows, keys = slice(begin_q, begin_q + q_length), slice(begin_k, begin_k + k_length)
        alone = [q[rows][None], k[keys][None], v[keys][None], sinks]
        alone = [x.detach().requires_grad_() for x in alone]
        out, lse = pumice.ops.flash_attention(
            *alone[:3], causal=True, sinks=alone[3], return_lse=True
        )
        ((out[0] * scale[rows]).sum() + lse.sum()).backward()
        for grad, place, x in zip(expected[:3], (rows, keys, keys), alone[:3], strict=True):
            grad[place] += x.grad[0]  # type: ignore[index]
        expected[3] += alone[3].grad  # type: ignore[arg-type]
        begin_q, begin_k = begin_q + q_length, begin_k + k_length
    for leaf, grad in zip(leaves, expected[:3], strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, grad)
    torch.testing.assert_close(sinks.grad, expected[3])


def test_only_the_wanted_gradients(backend: Backend) -> None:
    operands, keywords = dense(backend, mask="causal", sinks=True)
    sinks = keywords["sinks"].requires_grad_()
    out = pumice.ops.flash_attention(*operands, **keywords)
    assert out.requires_grad
    out.sum().backward()
    assert sinks.grad is not None
    assert all(x.grad is None for x in operands)
    with torch.no_grad():
        assert not pumice.ops.flash_attention(*operands, **keywords).requires_grad


def test_a_gradient_of_a_gradient_is_refused(backend: Backend) -> None:
    operands, keywords = dense(backend)
    leaves = [x.requires_grad_() for x in operands]
    out = pumice.ops.flash_attention(*leaves, **keywords)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="Attention has first derivatives only"):
        grad.sum().backward()


def schema_arguments(
    backend: Backend, case: AttentionCase
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """What Python passes to the operator."""
    given = inputs(case)
    operands: list[Tensor | None] = []
    operands += [torch.stack(tensors) for tensors in zip(*given.sequences, strict=True)]
    keywords = given.keywords
    index = torch.tensor([1, 4, 2**30], dtype=torch.int32)
    bits = blocks = None
    if given.mask is not None:
        bits, blocks, _ = pumice.ops.pack_attention_mask(given.mask.to(backend.device))
    operands += [None, None, given.sinks, given.alibi_slopes, index, bits, blocks]
    left, right = keywords.get("window", (-1, -1))
    options = {"softmax_scale": 0.3, "causal": given.options[0].causal, "window_left": left,
               "window_right": right, "sink_tokens": 2, "global_tokens": 1,
               "softcap": case.softcap}  # fmt: skip
    return [x if x is None else x.to(backend.device) for x in operands], options


FULL = AttentionCase(**SIZES, mask="bits causal window", sinks=True, alibi="BH", softcap=3.0)
PLAIN = AttentionCase(**SIZES)


@pytest.mark.parametrize("case", [FULL, PLAIN], ids=["full", "plain"])
def test_opcheck(backend: Backend, case: AttentionCase) -> None:
    operands, options = schema_arguments(backend, case)
    for i in (0, 1, 2, 5):
        if operands[i] is not None:
            operands[i].requires_grad_()  # type: ignore[union-attr]
    torch.library.opcheck(backend.ops.flash_attention.default, tuple(operands), options)


def test_opcheck_packed(backend: Backend) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(12, 4, 8, generator=g), torch.randn(15, 2, 8, generator=g)
    cu = (offsets([3, 0, 9]), offsets([5, 4, 6]))
    operands = [x.to(backend.device) for x in (q, k, k, *cu)] + [None] * 5
    operands[0].requires_grad_()
    options = {"softmax_scale": 0.3, "max_seqlen_q": 9, "max_seqlen_k": 6, "causal": True}
    torch.library.opcheck(backend.ops.flash_attention.default, tuple(operands), options)


@pytest.mark.parametrize("case", [FULL, PLAIN], ids=["full", "plain"])
def test_opcheck_backward(backend: Backend, case: AttentionCase) -> None:
    operands, options = schema_arguments(backend, case)
    out, lse = backend.ops.flash_attention(*operands, **options)
    for grad_lse in (None, torch.ones_like(lse)):
        given = (torch.ones_like(out), grad_lse, *operands[:3], out, lse, *operands[3:])
        torch.library.opcheck(backend.ops.flash_attention_backward.default, given, options)


def test_opcheck_pack_and_merge(backend: Backend) -> None:
    mask = torch.ones(2, 1, 70, 90, dtype=torch.bool, device=backend.device).tril()
    torch.library.opcheck(backend.ops.attention_mask_pack.default, (mask,))
    outs = torch.randn(3, 2, 5, 4, 8, device=backend.device, requires_grad=True)
    lses = torch.randn(3, 2, 4, 5, device=backend.device, requires_grad=True)
    torch.library.opcheck(backend.ops.merge_attention.default, (outs, lses))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    masked, lse = pumice.ops.flash_attention(
        q, k, v, causal=True, mask=mask, sinks=sinks, softcap=2.0, return_lse=True
    )
    windowed = pumice.ops.flash_attention(
        q, k, v, window=(3, 2), global_tokens=torch.tensor([2, -1], device=q.device), sink_tokens=1
    )
    listed = pumice.ops.flash_attention(q, k, v, window=(1, 0), global_tokens=(3, 0))
    return masked + windowed * listed, lse


def test_compiles_for_any_shape(backend: Backend) -> None:
    compiled = backend.compile(attend)
    for batch, queries, keys in ((2, 5, 9), (3, 8, 8), (4, 17, 6)):
        case = AttentionCase(**(SIZES | {"batch": batch, "queries": queries, "keys": keys}),
                             mask="bits", sinks=True)  # fmt: skip
        operands, keywords = dense(backend, **vars(case))
        given = (*operands, keywords["mask"], keywords["sinks"])
        for result, expected in zip(compiled(*given), attend(*given), strict=True):
            assert torch.equal(result, expected)


def test_packed_mask_compiles(backend: Backend) -> None:
    operands, keywords = dense(backend, mask="bits")
    mask = pumice.ops.pack_attention_mask(keywords["mask"])

    def function(q: Tensor, k: Tensor, v: Tensor, mask: pumice.ops.PackedMask) -> Tensor:
        return pumice.ops.flash_attention(q, k, v, mask=mask)

    assert torch.equal(backend.compile(function)(*operands, mask), function(*operands, mask))


def test_packed_compiles(backend: Backend) -> None:
    def function(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, longest: int) -> Tensor:
        return pumice.ops.flash_attention_varlen(
            q, k, k, cu_q, cu_k, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
        )

    compiled = backend.compile(function)
    for q_lengths, k_lengths in (([3, 5], [6, 6]), ([1, 9, 2], [8, 9, 3])):
        q = torch.randn(sum(q_lengths), 2, 8, device=backend.device)
        k = torch.randn(sum(k_lengths), 2, 8, device=backend.device)
        cu = (offsets(q_lengths).to(backend.device), offsets(k_lengths).to(backend.device))
        given = (q, k, *cu, max(q_lengths + k_lengths))
        assert torch.equal(compiled(*given), function(*given))


def test_gradients_compile(backend: Backend) -> None:
    compiled = backend.compile(attend)
    gradients = []
    for function in (attend, compiled):
        operands, keywords = dense(backend, mask="bits", sinks=True)
        leaves = [x.requires_grad_() for x in (*operands, keywords["sinks"])]
        out, lse = function(*leaves[:3], keywords["mask"], leaves[3])
        (out.square().sum() + lse.sin().sum()).backward()
        gradients.append([x.grad for x in leaves])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


class Layer(torch.nn.Module):
    def __init__(self, sinks: Tensor) -> None:
        super().__init__()
        self.sinks = torch.nn.Parameter(sinks)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return pumice.ops.flash_attention(
            q, k, v, causal=True, window=(5, 0), sink_tokens=1, sinks=self.sinks
        )


def test_export(backend: Backend) -> None:
    operands, keywords = dense(backend, sinks=True)
    layer = Layer(keywords["sinks"])
    batch = torch.export.Dim("batch", min=1, max=64)
    queries, keys = torch.export.Dim("queries", max=4096), torch.export.Dim("keys", max=4096)
    shapes = ({0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch, 1: keys})
    exported = torch.export.export(layer, tuple(operands), dynamic_shapes=shapes)
    for sizes in ((2, 9, 13), (5, 4, 30)):
        operands, _ = dense(backend, batch=sizes[0], queries=sizes[1], keys=sizes[2])
        assert torch.equal(exported.module()(*operands), layer(*operands))


def test_meta_tensors() -> None:
    q = torch.empty(2, 9, 4, 8, device="meta", dtype=torch.float16)
    k, v = q.new_empty(2, 13, 2, 8), q.new_empty(2, 13, 2, 6)
    out, lse = pumice.ops.flash_attention(q, k, v, return_lse=True)
    assert (out.shape, out.dtype, out.device.type) == ((2, 9, 4, 6), torch.float16, "meta")
    assert (lse.shape, lse.dtype) == ((2, 4, 9), torch.float32)
    cu = torch.empty(3, device="meta", dtype=torch.int32)
    out, lse = pumice.ops.flash_attention_varlen(
        q[0], k[0], v[0], cu, cu, max_seqlen_q=9, max_seqlen_k=13, return_lse=True
    )
    assert (out.shape, lse.shape) == ((9, 4, 6), (4, 9))
    mask = pumice.ops.pack_attention_mask(torch.empty(9, 77, device="meta", dtype=torch.bool))
    assert (mask.bits.shape, mask.blocks.shape) == ((1, 1, 9, 3), (1, 1, 1, 2))


def test_cuda_graph(backend: Backend) -> None:
    """Captured once, replayed on other operands, other lengths and other masks."""
    if backend.name != "cuda":
        pytest.skip("CUDA graphs")
    operands, keywords = dense(backend, dtype=torch.bfloat16, sinks=True, queries=1, keys=600,
                               dim=64, value_dim=64)  # fmt: skip
    listed = torch.tensor([5, -1], device="cuda")
    cu = offsets([1, 1]).cuda(), offsets([600, 300]).cuda()

    def function() -> list[Tensor]:
        q, k, v = (x.flatten(0, 1) for x in operands)
        return [
            pumice.ops.flash_attention(*operands, causal=True, sinks=keywords["sinks"]),
            pumice.ops.flash_attention(*operands, window=(3, 3), global_tokens=listed),
            pumice.ops.flash_attention_varlen(
                q, k, v, *cu, max_seqlen_q=1, max_seqlen_k=600, causal=True
            ),
        ]

    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    for x in operands:
        x.copy_(torch.randn_like(x))
    listed.copy_(torch.tensor([100, 7]))
    cu[1].copy_(offsets([17, 600]))
    graph.replay()
    torch.cuda.synchronize()
    for result, expected in zip(results, function(), strict=True):
        assert torch.equal(result, expected)
