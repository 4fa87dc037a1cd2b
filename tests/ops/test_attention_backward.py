"""The gradients of attention against those of its formulas in float64, in every combination of two
options; what their bits do not depend on; and what may not leak into them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attention_reference as reference
from attention_cases import PAIRS, AttentionCase, Inputs, fitted, inputs
from attention_gradients import NAMES, check, gradients, upstream
from backends import Backend
from cases import FLOATS, surrounded


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_pairs(backend: Backend, index: int) -> None:
    if backend.name == "emulated" and index % 8:
        pytest.skip("an eighth of the cases: the emulator takes seconds for each")
    check(backend, fitted(backend, PAIRS[index]), used=("both", "out")[index % 2])


# Blocks and tasks of several sizes, whole and ragged, with masks that skip some of them.
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(batch=1, queries=333, keys=333, heads=4, kv_heads=2, dim=64, value_dim=64,
                      mask="causal"),
        AttentionCase(batch=1, queries=290, keys=600, heads=3, kv_heads=3, dim=32, value_dim=48,
                      mask="left", dtype=torch.bfloat16),
        AttentionCase(batch=2, queries=520, keys=130, heads=2, dim=40, value_dim=16,
                      mask="streaming", dtype=torch.float16),
        AttentionCase(batch=1, queries=400, keys=400, heads=4, dim=80, value_dim=80,
                      mask="block bits", sinks=True, softcap=5.0),
        AttentionCase(batch=5, queries=300, keys=350, heads=4, kv_heads=2, dim=32, value_dim=32,
                      mask="causal global", packed=True, alibi="BH"),
    ],
)  # fmt: skip
def test_larger(backend: Backend, case: AttentionCase) -> None:
    if backend.name == "emulated":
        pytest.skip("too much for the emulator")
    check(backend, case, poison=3 if case.packed else 0)


@pytest.mark.parametrize("dims", [(512, 512), (576, 520), (300, 1)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_wide_heads(backend: Backend, dims: tuple[int, int], dtype: torch.dtype) -> None:
    if backend.name != "cpu":
        pytest.skip("CUDA has head dims up to 256")
    dim, value_dim = dims
    check(backend, AttentionCase(queries=70, keys=90, dim=dim, value_dim=value_dim, dtype=dtype,
                                 mask="causal"))  # fmt: skip


@pytest.mark.parametrize("used", ["out", "lse"])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_of_one_output(backend: Backend, used: str, packed: bool) -> None:
    case = AttentionCase(queries=40, keys=50, mask="causal window", sinks=True, packed=packed)
    check(backend, case, used)


@pytest.mark.parametrize("dtype", FLOATS)
def test_tokens_outside_of_sequences(backend: Backend, dtype: torch.dtype) -> None:
    """Their operands and their gradients of out may be anything; theirs are zero."""
    check(backend, AttentionCase(batch=5, queries=20, keys=70, packed=True, dtype=dtype,
                                 mask="causal", sinks=True), poison=5)  # fmt: skip


@pytest.mark.parametrize(("mask", "keys"), [("bits", 3), ("causal", 20), ("diagonal", 20)])
def test_queries_that_see_nothing(backend: Backend, mask: str, keys: int) -> None:
    """No bit is set, or they stand before all keys."""
    case = AttentionCase(queries=90, keys=keys, heads=2, kv_heads=2, mask=mask)
    given = inputs(case)
    found = gradients(backend, given, upstream(given))
    seen = reference.visible(given.options[0], case.batch, 90, keys, given.mask)
    blind = ~seen[:, 0].any(-1)
    assert blind.any()
    assert not found["query"][blind.flatten()].any()
    check(backend, case)


def packed_alone(case: AttentionCase, given: Inputs, b: int) -> tuple[AttentionCase, Inputs]:
    """Sequence b of a packed call, dense and alone."""
    queries, keys = case.lengths[b]
    alone = replace(case, batch=1, queries=queries, keys=keys, packed=False)
    return alone, replace(
        given, case=alone, sequences=[given.sequences[b]], options=[given.options[b]]
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", ["full", "causal", "global list", "streaming"])
def test_a_sequence_has_the_bits_it_has_alone(
    backend: Backend, mask: str, dtype: torch.dtype
) -> None:
    if backend.name == "emulated" and (mask == "full") != (dtype == torch.float16):
        pytest.skip("each mask or dtype once: the emulator is slow")
    case = AttentionCase(batch=5, queries=70, keys=100, heads=4, kv_heads=2, mask=mask, dtype=dtype,
                         packed=True, sinks=True)  # fmt: skip
    given = inputs(case)
    wanted = upstream(given)
    found = gradients(backend, given, wanted)
    q_lengths, k_lengths = zip(*case.lengths, strict=True)
    lengths = (q_lengths, k_lengths, k_lengths)
    rows = {n: found[n].split(s) for n, s in zip(NAMES[:3], lengths, strict=True)}
    for b in range(case.batch):
        _, alone = packed_alone(case, given, b)
        for name, gradient in gradients(backend, alone, [wanted[b]]).items():
            if name != "sinks":  # summed over the batch
                assert torch.equal(gradient, rows[name][b]), name


@pytest.mark.parametrize("dtype", FLOATS)
def test_broken_sequence_stays_alone(backend: Backend, dtype: torch.dtype) -> None:
    case = AttentionCase(batch=3, queries=40, keys=70, heads=2, mask="causal", dtype=dtype,
                         packed=True)  # fmt: skip
    given = inputs(case)
    wanted = upstream(given)
    expected_rows = gradients(backend, given, wanted)
    first = [torch.full_like(x, torch.nan) for x in given.sequences[0]]
    broken = replace(given, sequences=[tuple(first), *given.sequences[1:]])
    found = gradients(backend, broken, wanted)
    for name, length in (("query", 40), ("key", 70), ("value", 70)):
        assert torch.equal(found[name][length:], expected_rows[name][length:])


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "unaligned"])
def test_bits_repeat_in_any_layout(backend: Backend, layout: str) -> None:
    for dtype in FLOATS:
        case = AttentionCase(queries=70, keys=90, heads=4, kv_heads=2, dim=24, mask="causal",
                             dtype=dtype, sinks=True)  # fmt: skip
        given = inputs(case)
        wanted = upstream(given)
        first = gradients(backend, given, wanted)
        moved = replace(given, case=replace(case, layout=layout))
        for _ in range(1 if backend.name == "emulated" else 3):
            again = gradients(backend, moved, wanted)
            for name in NAMES[:3]:
                assert torch.equal(again[name], first[name]), name


# One sequence and few KV heads, or many: the work is cut differently for each number of threads.
@pytest.mark.parametrize("mask", ["full", "causal", "left", "global list", "block bits"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 6), (4, 2)])
def test_threads_do_not_change_bits(backend: Backend, heads: int, kv_heads: int, mask: str) -> None:
    if backend.name != "cpu":
        pytest.skip("the threads of the CPU kernels")
    for dtype in (torch.float32, torch.bfloat16):
        case = AttentionCase(batch=1, queries=330, keys=390, heads=heads, kv_heads=kv_heads, dim=32,
                             value_dim=40, mask=mask, dtype=dtype)  # fmt: skip
        given = inputs(case)
        wanted = upstream(given)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            first = gradients(backend, given, wanted)
            for count in (2, 3, 5):
                torch.set_num_threads(count)
                for name, gradient in gradients(backend, given, wanted).items():
                    assert torch.equal(gradient, first[name]), (name, count)
        finally:
            torch.set_num_threads(threads)


def call(backend: Backend, **changed: Any) -> tuple[Tensor, ...]:
    """The operator itself, on a few tokens of two heads that share a KV head."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 7, h, 24, generator=g) for h in (2, 1, 1))
    moved = [x.to(backend.device) for x in (query, key, value)]
    out, lse = backend.ops.flash_attention(*moved, *[None] * 7, softmax_scale=0.2, causal=True)
    tensors = {
        "grad_out": torch.randn(1, 7, 2, 24, generator=g).to(backend.device),
        "grad_lse": torch.randn(1, 2, 7, generator=g).to(backend.device),
        **dict(zip(NAMES[:3], moved, strict=True)),
        "out": out,
        "lse": lse,
    }
    for name, change in changed.items():
        tensors[name] = change(tensors[name])
    found: tuple[Tensor, ...] = backend.ops.flash_attention_backward(
        *tensors.values(), *[None] * 7, softmax_scale=0.2, causal=True
    )
    return found


def test_delta(backend: Backend) -> None:
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda x: kept.setdefault(name, x)

    delta = call(backend, **{n: keep(n) for n in ("grad_out", "grad_lse", "out")})[3]
    exact = (kept["grad_out"].double() * kept["out"].double()).sum(-1).transpose(1, 2)
    exact = exact - kept["grad_lse"]
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("before", [1, 16])
def test_reads_nothing_beyond(backend: Backend, before: int) -> None:
    names = ("grad_out", "grad_lse", "query", "key", "value", "out", "lse")
    moved = call(backend, **dict.fromkeys(names, lambda x: surrounded(x, before)))
    for gradient, same in zip(moved, call(backend), strict=True):
        assert torch.equal(gradient, same)


def test_expanded_gradient(backend: Backend) -> None:
    """That of out.sum(): one element with strides of 0."""
    ones = call(backend, grad_out=torch.ones_like)
    expanded = call(backend, grad_out=lambda x: torch.ones_like(x[:1, :1, :1, :1]).expand_as(x))
    for gradient, same in zip(expanded, ones, strict=True):
        assert torch.equal(gradient, same)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("grad_out", lambda x: x[..., :-1]),
        ("grad_out", lambda x: x.double()),
        ("out", lambda x: x[:, :-1]),
        ("out", lambda x: x[0]),
        ("lse", lambda x: x[..., :-1]),
        ("lse", lambda x: x.half()),
        ("lse", lambda x: x[0]),
        ("grad_lse", lambda x: x[:, :1]),
        ("grad_lse", lambda x: x.double()),
        ("key", lambda x: x.half()),
        ("value", lambda x: x[:, :-1]),
    ],
)
def test_refusals(backend: Backend, name: str, change: Any) -> None:
    with pytest.raises(RuntimeError, match=f"flash_attention_backward: .*{name}"):
        call(backend, **{name: change})


def test_the_oracle_by_finite_differences() -> None:
    """Its gradients are torch's; that they are those of the formulas, masks and all."""
    g = torch.Generator().manual_seed(0)
    sizes = ((1, 4, 2, 3), (1, 5, 1, 3), (1, 5, 1, 2), (2,))
    leaves = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in sizes]
    options = reference.Options(causal=True, window=(2, 0), sink_tokens=1, softcap=2.0)

    def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        slopes = torch.tensor([0.1, 0.3])
        return reference.attention(query, key, value, options, sinks=sinks, alibi_slopes=slopes)

    assert torch.autograd.gradcheck(attend, leaves)
