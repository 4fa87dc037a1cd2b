"""What a row of attention does not depend on: what it does not see, its neighbours, the threads."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attention_reference as reference
import pumice
from attention_cases import MASKS, AttentionCase, inputs, offsets, run
from backends import Backend
from cases import FLOATS

BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@pytest.mark.parametrize("operand", ["key", "value", "both"])
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "full"])
def test_hidden_keys_do_not_leak(backend: Backend, mask: str, operand: str) -> None:
    """NaN and ±Inf in some keys reach the rows that see them, and no other: not those of the same
    tile, nor through a weight of 0 times NaN."""
    if backend.name == "emulated" and (operand == "both") != (mask in ("causal", "tree")):
        pytest.skip("each mask once or twice: the emulator is slow")
    for bad, value in BAD.items():
        if backend.name == "emulated" and bad == "-inf":
            continue
        for dtype in FLOATS if backend.name == "cpu" else (torch.bfloat16,):
            case = AttentionCase(batch=1, queries=70, keys=90, heads=2, dim=16, value_dim=24,
                                 mask=mask, dtype=dtype)  # fmt: skip
            check_hidden(backend, case, value, operand)


def some_keys(seen: Tensor) -> tuple[list[int], Tensor]:
    """Keys here and there that leave some rows alone, and which [H, S_q] they touch."""
    touched = torch.zeros(seen.shape[:2], dtype=torch.bool)
    chosen: list[int] = []
    for j in torch.randperm(seen.shape[2], generator=torch.Generator().manual_seed(0)).tolist():
        more = touched | seen[..., j]
        if more.float().mean() <= 0.8 and len(chosen) < 8:
            chosen.append(j)
            touched = more
    assert chosen
    return chosen, touched


def check_hidden(backend: Backend, case: AttentionCase, bad: float, operand: str) -> None:
    given = inputs(case)
    ((query, key, value),) = given.sequences
    ((exact, exact_lse),) = given.exact()
    ((plain, _),) = given.exact(case.dtype)
    seen = reference.visible(given.options[0], 1, case.queries, case.keys, given.mask)
    seen = seen[0].expand(case.heads, -1, -1)
    poisoned, touched = some_keys(seen)
    key, value = key.clone(), value.clone()
    if operand in ("key", "both"):
        key[poisoned] = bad
    if operand in ("value", "both"):
        value[poisoned, :, 3:20:4] = bad
    ((out, lse),) = run(backend, replace(given, sequences=[(query, key, value)]))
    untouched = ~touched.T
    unit = 2 * reference.rounding(case.dtype) * max(1.0, reference.largest(exact))
    reference.assert_as_exact_as_plain(out[untouched], exact[untouched], plain[untouched], unit)
    clean_lse = exact_lse.T[untouched]
    reference.assert_as_exact_as_plain(lse.T[untouched], clean_lse, clean_lse, given.lse_unit())
    if operand == "value":  # weights are positive: what a row sees, it gets, and there only
        columns = torch.zeros(case.value_dim, dtype=torch.bool)
        columns[3:20:4] = True
        rows = out[~untouched]
        assert not rows[:, columns].isfinite().any()
        if bad == bad:
            assert (rows[:, columns] == bad).all()
        reference.assert_as_exact_as_plain(
            rows[:, ~columns], exact[~untouched][:, ~columns], plain[~untouched][:, ~columns], unit
        )
    elif bad != bad:  # a NaN score makes the row's sum NaN
        assert out[~untouched].isnan().all()
        assert lse.T[~untouched].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mask", ["full", "causal", "causal window", "global list"])
def test_nothing_around_the_operands_is_used(
    backend: Backend, mask: str, dtype: torch.dtype
) -> None:
    """NaN between heads, after dims and rows, and before and after packed sequences."""
    if backend.name == "emulated" and dtype == torch.float16:
        pytest.skip("float16 is loaded as bfloat16 is")
    for dim, value_dim in ((16, 16), (33, 17), (72, 40)):
        case = AttentionCase(batch=5, queries=9, keys=67, dim=dim, value_dim=value_dim, mask=mask,
                             dtype=dtype, packed=True)  # fmt: skip
        if backend.name == "emulated" and dim == 33:
            case = replace(case, batch=2)
        given = inputs(case)
        expected = run(backend, given)
        amid = run(backend, replace(given, case=replace(case, layout="sliced")), poison=3)
        for (out, lse), (other_out, other_lse) in zip(expected, amid, strict=True):
            assert torch.equal(out, other_out)
            assert torch.equal(lse, other_lse)


def test_poison_in_the_neighbouring_sequence(backend: Backend) -> None:
    """Sequences that share a tile of memory: a broken one breaks itself alone."""
    for mask in ("full", "causal", "window"):
        case = AttentionCase(batch=5, queries=21, keys=37, mask=mask, packed=True,
                             dtype=torch.bfloat16)  # fmt: skip
        given = inputs(case)
        expected = run(backend, given)
        broken = [tuple(torch.full_like(x, torch.nan) if b == 2 else x for x in tensors)
                  for b, tensors in enumerate(given.sequences)]  # fmt: skip
        results = run(backend, replace(given, sequences=broken))  # type: ignore[arg-type]
        for b, ((out, lse), (other_out, other_lse)) in enumerate(
            zip(expected, results, strict=True)
        ):
            if b != 2:
                assert torch.equal(out, other_out)
                assert torch.equal(lse, other_lse)


@pytest.mark.parametrize("mask", ["full", "causal", "streaming", "global tensor", "padding bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_repeat(backend: Backend, mask: str, dtype: torch.dtype) -> None:
    for queries, keys in ((1, 300), (40, 90)):
        given = inputs(AttentionCase(batch=2, queries=queries, keys=keys, mask=mask, dtype=dtype,
                                     sinks=True, heads=4))  # fmt: skip
        first = run(backend, given)
        for _ in range(2):
            for (out, lse), (other_out, other_lse) in zip(first, run(backend, given), strict=True):
                assert torch.equal(out, other_out)
                assert torch.equal(lse, other_lse)


@pytest.mark.parametrize("mask", ["full", "causal", "causal window", "streaming", "global"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_invariance(backend: Backend, mask: str, dtype: torch.dtype) -> None:
    """A sequence has the same bits alone, in a batch and packed among others, whatever is said of
    the longest."""
    emulated = backend.name == "emulated"
    if emulated and (dtype == torch.float16 or mask == "global"):
        pytest.skip("too much for the emulator")
    # One query of many keys is where a small batch tempts a kernel to split the keys.
    for queries, keys in ((1, 260), (5, 100)) if emulated else ((1, 3000), (5, 700), (130, 200)):
        case = AttentionCase(batch=4, queries=queries, keys=keys, heads=4, kv_heads=2, dim=64,
                             value_dim=64, mask=mask, dtype=dtype, sinks=True)  # fmt: skip
        given = inputs(case)
        together = run(backend, given)
        alone = replace(given, case=replace(case, batch=1), sequences=given.sequences[2:3])
        ((out, lse),) = run(backend, alone)
        assert torch.equal(out, together[2][0])
        assert torch.equal(lse, together[2][1])
        packed_out, packed_lse = among_others(backend, given)
        assert torch.equal(packed_out, together[2][0])
        assert torch.equal(packed_lse, together[2][1])


def among_others(backend: Backend, given: object) -> tuple[Tensor, Tensor]:
    """The third sequence, packed between a part of the first and all of the second."""
    sequences, keywords = given.sequences, given.keywords  # type: ignore[attr-defined]
    short = tuple(x[:1] for x in sequences[0])
    chosen = (short, sequences[2], sequences[1])
    operands = [torch.cat(tensors).to(backend.device) for tensors in zip(*chosen, strict=True)]
    q_lengths = [len(tensors[0]) for tensors in chosen]
    k_lengths = [len(tensors[1]) for tensors in chosen]
    moved = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in keywords.items()}
    out, lse = pumice.ops.flash_attention_varlen(
        *operands,
        offsets(q_lengths).to(backend.device),
        offsets(k_lengths).to(backend.device),
        max_seqlen_q=max(q_lengths) + 77,
        max_seqlen_k=max(k_lengths) + 1000,
        **moved,
        return_lse=True,
    )
    rows = slice(1, 1 + q_lengths[1])
    return out[rows].cpu(), lse[:, rows].cpu()


@pytest.mark.parametrize("hidden", [0.0, float("nan")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sharing_the_keys_changes_no_bit(dtype: torch.dtype, hidden: float) -> None:
    """On the CPU the keys of many query blocks are packed once for all, those of a few are not."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 333, 8, 40, generator=generator).to(dtype)
    key = torch.randn(1, 333, 1, 40, generator=generator).to(dtype)
    value = torch.randn(1, 333, 1, 24, generator=generator).to(dtype)
    value[:, 300] = hidden  # from the rows before
    many, lse = pumice.ops.flash_attention(query, key, value, causal=True, return_lse=True)
    few, few_lse = pumice.ops.flash_attention(
        query[:, -100:], key, value, causal=True, return_lse=True
    )
    torch.testing.assert_close(many[:, -100:], few, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(lse[..., -100:], few_lse)
    assert many[:, :300].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_thread_invariance(dtype: torch.dtype) -> None:
    case = AttentionCase(batch=3, queries=130, keys=300, heads=4, kv_heads=2, dim=64, value_dim=64,
                         mask="causal", dtype=dtype)  # fmt: skip
    given = inputs(case)
    dense = [torch.stack(tensors) for tensors in zip(*given.sequences, strict=True)]
    few = [dense[0][:, -1:], *dense[1:]]
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append([
                pumice.ops.flash_attention(*operands, causal=True) for operands in (dense, few)
            ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for out in results[1:]:
        assert torch.equal(out[0], results[0][0])
        assert torch.equal(out[1], results[0][1])


MEMORY = """
import resource
import sys
import torch
import pumice

torch.set_num_threads(2)
length, backward = int(sys.argv[1]), sys.argv[2] == "backward"
def attend(n):
    x = [torch.randn(1, n, 4, 64, requires_grad=backward) for _ in range(3)]
    out, lse = pumice.ops.flash_attention(*x, causal=True, softcap=20.0, return_lse=True)
    if backward:
        (out.sum() + lse.sum()).backward()
    return out
attend(64)  # whatever is loaded or kept by the first call
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = attend(length)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_is_linear(direction: str) -> None:
    """The most that the process ever had in memory, as the kernel of the operating system counts.

    4096 tokens of 4 heads: operands and results take 16 MiB forward and 41 MiB with gradients; one
    matrix of scores would take 64 MiB, those of all heads 256 MiB.
    """
    finished = subprocess.run(
        [sys.executable, "-c", MEMORY, "4096", direction], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    grown = int(finished.stdout) / 1024
    assert grown < (32 if direction == "forward" else 60), f"{grown} MiB"


def test_memory_is_linear_on_cuda(backend: Backend) -> None:
    if backend.name != "cuda":
        pytest.skip("asks the CUDA allocator")
    x = [torch.randn(1, 4096, 4, 64, device="cuda", requires_grad=True) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pumice.ops.flash_attention(*x, causal=True).sum().backward()
    grown = (torch.cuda.max_memory_allocated() - before) / 2**20
    assert grown < 56, f"{grown} MiB"
