"""flash_attention against float64, in every combination of two of its options."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest
import torch

import attention_cases
import pumice
from attention_cases import (
    AXES,
    PAIRS,
    AttentionCase,
    check,
    fitted,
    inputs,
    of_axes,
    offsets,
    run,
)
from backends import Backend, backend_named
from cases import FLOATS


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_pairs(backend: Backend, index: int) -> None:
    if backend.name == "emulated" and index % 6:
        pytest.skip("a sixth of the cases: the emulator takes half a second for each")
    check(backend, fitted(backend, PAIRS[index]))


@pytest.mark.slow
@pytest.mark.parametrize("mask", attention_cases.MASKS)
@pytest.mark.skipif("PUMICE_FULL_MATRIX" not in os.environ, reason="PUMICE_FULL_MATRIX=1 runs it")
def test_every_combination(backend: Backend, mask: str) -> None:
    """All of dtype × head dims × heads × lengths × packed × sinks of one mask, the rest drawn."""
    names = ("dtype", "dims", "heads", "lengths", "packed", "sinks")
    others = [name for name in AXES if name not in names and name != "mask"]
    g = torch.Generator().manual_seed(0)
    values = (dict.fromkeys(AXES[name]) for name in names)
    for seed, chosen in enumerate(itertools.product(*values)):
        row = dict(zip(names, chosen, strict=True)) | {"mask": mask}
        for name in others:
            row[name] = AXES[name][int(torch.randint(len(AXES[name]), (1,), generator=g))]
        check(backend, fitted(backend, of_axes(row, seed)))


@pytest.mark.parametrize("mask", attention_cases.MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks(backend: Backend, mask: str, dtype: torch.dtype) -> None:
    """Every mask over several tiles, with more queries than keys and fewer."""
    emulated = backend.name == "emulated"
    if emulated and dtype == torch.float32:
        pytest.skip("the masks are those of bfloat16")
    lengths = ((70, 150), (140, 70)) if emulated else ((150, 330), (330, 150))
    for queries, keys in lengths:
        check(backend, AttentionCase(batch=1, queries=queries, keys=keys, mask=mask, dtype=dtype,
                                     sinks=queries > keys, dim=32, value_dim=32))  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [*range(8, 257, 8), 1, 3, 100, 255])
def test_head_dims(backend: Backend, dim: int, dtype: torch.dtype) -> None:
    if backend.name == "emulated" and dim not in (8, 64, 100, 104, 128, 200, 256):
        pytest.skip("one dim for each tile, and odd ones")
    check(backend, AttentionCase(batch=1, queries=33, keys=67, dim=dim, value_dim=dim, dtype=dtype,
                                 mask="causal", seed=dim))  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dims", [(512, 512), (576, 512), (300, 700), (8, 1000)])
def test_wide_heads_on_the_cpu(dims: tuple[int, int], dtype: torch.dtype) -> None:
    case = AttentionCase(batch=1, queries=40, keys=130, dim=dims[0], value_dim=dims[1],
                         dtype=dtype, mask="causal")  # fmt: skip
    check(backend_named("cpu"), case)


def test_wide_heads_are_refused_on_cuda(backend: Backend) -> None:
    if backend.name == "cpu":
        pytest.skip("the CPU takes any head dim")
    for dim, value_dim in ((257, 64), (64, 264)):
        case = AttentionCase(queries=3, keys=5, dim=dim, value_dim=value_dim)
        with pytest.raises((ValueError, RuntimeError), match="256"):
            run(backend, inputs(case))


# One query of many keys: what decoding does, and where keys are split among blocks.
@pytest.mark.parametrize("mask", ["full", "causal", "streaming", "global list"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 2), (16, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_few_queries_of_many_keys(
    backend: Backend, mask: str, heads: int, kv_heads: int, packed: bool
) -> None:
    emulated = backend.name == "emulated"
    if emulated and (mask in ("full", "global list") or heads == 16):
        pytest.skip("too much for the emulator")
    for queries, keys in ((1, 700 if emulated else 2100), (5, 333)):
        for dtype in (torch.bfloat16,) if emulated else FLOATS:
            case = AttentionCase(batch=2, queries=queries, keys=keys, heads=heads,
                                 kv_heads=kv_heads, dim=64, value_dim=64, mask=mask, dtype=dtype,
                                 packed=packed, sinks=True)  # fmt: skip
            check(backend, case)


@pytest.mark.parametrize("mask", ["full", "causal", "causal window", "streaming"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_larger(backend: Backend, mask: str, dtype: torch.dtype) -> None:
    if backend.name == "emulated":
        pytest.skip("too much for the emulator")
    case = AttentionCase(batch=1, queries=1030, keys=1100, heads=4, kv_heads=2, dim=128,
                         value_dim=128, mask=mask, dtype=dtype)  # fmt: skip
    check(backend, case)


@pytest.mark.parametrize("mask", ["full", "causal", "window", "global", "streaming"])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_to_do(backend: Backend, mask: str, packed: bool) -> None:
    """No sequences, no queries, no keys."""
    for batch, queries, keys in ((0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 0, 0)):
        for sinks in (False, True):
            case = AttentionCase(batch=batch, queries=queries, keys=keys, mask=mask,
                                 packed=packed, sinks=sinks)  # fmt: skip
            check(backend, case)


@pytest.mark.parametrize("kind", ["matrix", "padding", "heads"])
def test_nothing_to_do_with_bits(backend: Backend, kind: str) -> None:
    masks = {"matrix": (3, 5), "padding": (2, 1, 1, 5), "heads": (2, 2, 3, 5)}
    for queries, keys in ((0, 5), (3, 0), (0, 0)):
        sizes = {3: queries, 5: keys}
        shape = [sizes.get(size, size) for size in masks[kind]]
        q = torch.randn(2, queries, 2, 8, device=backend.device)
        k = torch.randn(2, keys, 2, 8, device=backend.device)
        mask = torch.ones(shape, dtype=torch.bool, device=backend.device)
        out, lse = pumice.ops.flash_attention(q, k, k, mask=mask, return_lse=True)
        assert out.shape == q.shape
        assert not out.any()
        assert (lse == -torch.inf).all()


def test_a_query_that_sees_nothing(backend: Backend) -> None:
    """Its out is 0 and its lse -inf; with a sink, the sink's logit."""
    case = AttentionCase(batch=1, queries=130, keys=66, mask="causal", dtype=torch.float16)
    ((out, lse),) = check(backend, case)
    assert not out[:64].any()
    assert (lse[:, :64] == -torch.inf).all()
    assert out[64:].any(dim=-1).all()
    given = inputs(replace(case, sinks=True))
    ((out, lse),) = run(backend, given)
    assert not out[:64].any()
    assert given.sinks is not None
    assert torch.equal(lse[:, :64], given.sinks[:, None].expand(-1, 64))


def test_a_sink_of_minus_infinity_is_none(backend: Backend) -> None:
    given = inputs(AttentionCase(batch=1, queries=9, keys=5, mask="causal", heads=2, sinks=True))
    sinks = torch.full((2,), -torch.inf, device=backend.device)
    for (out, lse), (other_out, other_lse) in zip(
        run(backend, given, sinks=sinks), run(backend, given, sinks=None), strict=True
    ):
        assert torch.equal(out, other_out)
        assert torch.equal(lse, other_lse)


@pytest.mark.parametrize("scale", [0.0, -0.3, 5.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_scale(backend: Backend, scale: float, dtype: torch.dtype) -> None:
    """Zero makes means of the values; with a negative one the least products weigh most."""
    for softcap in (0.0, 2.0):
        check(backend, AttentionCase(batch=1, queries=19, keys=130, softmax_scale=scale,
                                     softcap=softcap, mask="causal", dtype=dtype))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(backend: Backend, dtype: torch.dtype) -> None:
    """Scores of thousands, rising and falling along the keys: nothing overflows, sums rescale."""
    for direction in (1.0, -1.0):
        given = inputs(AttentionCase(batch=1, queries=20, keys=200, dtype=dtype, softmax_scale=1.0))
        ((query, key, value),) = given.sequences
        ramp = torch.linspace(-300, 300, 200)[:, None, None] * direction
        steep = (key * 0.1 + ramp).to(dtype)
        loud = replace(given, sequences=[(query, steep, value)])
        ((out, lse),) = run(backend, loud)
        ((exact_out, exact_lse),) = loud.exact()
        assert out.isfinite().all()
        # A score of 10^4 is known to 10^-3: what float32 roundings of its terms amount to.
        assert (lse - exact_lse).abs().max() <= loud.lse_unit()
        assert (out - exact_out).abs().max() <= 0.02


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 3)}, {"sinks": True}])
def test_layouts_agree(backend: Backend, options: dict[str, object]) -> None:
    """Dense and packed, and all strides: the same bits."""
    case = AttentionCase(batch=2, queries=37, keys=70, heads=4, kv_heads=2, dim=24, value_dim=40,
                         dtype=torch.float16)  # fmt: skip
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = torch.tensor([0.5, -1.0, 2.0, 0.0], device=backend.device)
    given = inputs(case)
    expected = run(backend, given, **options)
    for layout in ("transposed", "sliced", "unaligned"):
        other = run(backend, replace(given, case=replace(case, layout=layout)), **options)
        for (out, lse), (other_out, other_lse) in zip(expected, other, strict=True):
            assert torch.equal(out, other_out), layout
            assert torch.equal(lse, other_lse), layout


def test_expanded_operands(backend: Backend) -> None:
    """One key and value for the whole batch, one query for all its positions: strides of 0."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, 4, 16, generator=g).to(backend.device).expand(2, 9, 4, 16)
    key = torch.randn(1, 33, 1, 16, generator=g).to(backend.device).expand(2, 33, 2, 16)
    value = torch.randn(1, 1, 1, 16, generator=g).to(backend.device).expand(2, 33, 2, 16)
    out = pumice.ops.flash_attention(query, key, value)
    copies = [x.contiguous() for x in (query, key, value)]
    assert torch.equal(out, pumice.ops.flash_attention(*copies))
    torch.testing.assert_close(out, value[:, :9].repeat_interleave(2, dim=2))


def available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("far_operand", [0, 1, 2])
def test_operands_beyond_2_31_elements(backend: Backend, far_operand: int) -> None:
    """Tokens 2^30 elements apart, the last beyond what an int32 counts. Memory that nobody touches
    takes none, on the CPU; the emulator mirrors it."""
    if backend.name == "emulated" and (far_operand != 1 or available_memory() < 12 * 2**30):
        pytest.skip("once, and with 12 GiB of free memory")
    if backend.name == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of device memory")
    far = 2**30
    g = torch.Generator().manual_seed(0)
    operands = list(torch.randn(3, 1, 3, 1, 16, generator=g).half().to(backend.device))
    expected = pumice.ops.flash_attention(*operands, causal=True)
    buffer = torch.empty(2 * far + 16, dtype=torch.float16, device=backend.device)
    wide = buffer.as_strided((1, 3, 1, 16), (0, far, 16, 1))
    operands[far_operand] = wide.copy_(operands[far_operand])
    assert torch.equal(pumice.ops.flash_attention(*operands, causal=True), expected)


@pytest.mark.parametrize("shape", [(1200, 3, 64), (1, 3, 70000), (70000, 1, 1), (1, 4300000, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_more_than_65535_of_everything(
    backend: Backend, shape: tuple[int, int, int], packed: bool
) -> None:
    """Sequences, heads, tiles of queries: past what a side of a CUDA grid can be."""
    if backend.name == "emulated":
        pytest.skip("too much for the emulator")
    batch, queries, _ = shape
    g = torch.Generator().manual_seed(0)
    q = torch.randn(*shape, 8, generator=g).half().to(backend.device)
    k = torch.zeros(batch, 2, 1, 8, dtype=torch.float16, device=backend.device)
    v = torch.randn(batch, 2, 1, 8, generator=g).half().to(backend.device)
    if packed:
        cu = (offsets([queries] * batch), offsets([2] * batch))
        out = pumice.ops.flash_attention_varlen(
            *(x.flatten(0, 1) for x in (q, k, v)), *(x.to(backend.device) for x in cu),
            max_seqlen_q=queries, max_seqlen_k=2,
        ).view_as(q)  # fmt: skip
    else:
        out = pumice.ops.flash_attention(q, k, v)
    mean = v.float().mean(dim=1, keepdim=True).half()  # keys of 0 weigh the same
    assert (out - mean).abs().max() <= 2e-3
