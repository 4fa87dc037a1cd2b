"""Run the CPU kernels on inputs between unreadable pages: a program for test_bounds.py to run.

A read past either end of an input ends the process with a segmentation fault. Prefetches may go
there; they never fault.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys

import torch
from torch import Tensor

import pumice

LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
NO_ACCESS = 0
kept: list[mmap.mmap] = []


def forbid(address: int) -> None:
    if LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), NO_ACCESS) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy that ends right before (or begins right after) a page that cannot be read."""
    if tensor.numel() == 0:
        return tensor
    size = tensor.numel() * tensor.element_size()
    inside = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, inside + 2 * PAGE)
    kept.append(memory)  # never unmapped: the pages stay forbidden
    offset = PAGE + (inside - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    copy.copy_(tensor.reshape(-1))
    base = copy.data_ptr() - offset
    forbid(base)
    forbid(base + PAGE + inside)
    return copy.view(tensor.shape)


def int4() -> None:
    g = torch.Generator().manual_seed(1)
    dtypes = itertools.cycle((torch.float32, torch.float16, torch.bfloat16))
    options = itertools.cycle(itertools.product((16, -1, 128), (4, 4, 4, 2, 3, 8), (0, 0, 1)))
    sizes = ((1, 3, 9, 19), (1, 5, 17), (1, 15, 33, 64, 100, 128, 515))
    for m, n, k in itertools.product(*sizes):
        dtype = next(dtypes)
        group_size, bits, unsorted_groups = next(options)
        groups = 1 if group_size == -1 else -(-k // group_size)
        q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=g)
        tensors = {
            "x": torch.randn(m, k, generator=g).to(dtype),
            "qweight": pumice.ops.int4_pack(q, bits),
            "scales": torch.rand(n, groups, generator=g).to(dtype),
            "zeros": torch.ones(n, groups, dtype=torch.uint8 if k % 2 else dtype),
            "perm": torch.randperm(k, generator=g).int(),
            "bias": torch.randn(n, generator=g),
            "outlier_idx": torch.tensor([k - 1], dtype=torch.int32),
            "outlier_weight": torch.rand(n, 1),
            "lora_a": torch.rand(3, k),
            "lora_b": torch.rand(n, 3),
        }
        if unsorted_groups:
            tensors["g_idx"] = torch.randint(0, groups, (k,), dtype=torch.int32, generator=g)
        for at_end in (False, True):
            inputs = {name: guarded(tensor, at_end) for name, tensor in tensors.items()}
            pumice.ops.int4_unpack(inputs["qweight"], k, bits)
            pumice.ops.int4_pack(guarded(q, at_end), bits)
            for int8_activation in (False, True):
                pumice.ops.int4_linear(
                    **inputs, group_size=group_size, bits=bits, int8_activation=int8_activation
                )


def attention() -> None:
    """Dense and packed, with every tensor that a call can have; then the gradients."""
    g = torch.Generator().manual_seed(2)
    dtypes = itertools.cycle((torch.float32, torch.float16, torch.bfloat16))
    masks = itertools.cycle(
        ({}, {"causal": True}, {"causal": True, "window": (5, 0), "sink_tokens": 2}, {"bits": 1})
    )
    dims = ((64, 64), (33, 17), (128, 40), (1, 5), (15, 100))
    for (queries, keys), (dim, value_dim) in itertools.product(
        ((1, 67), (5, 129), (70, 33), (3, 0)), dims
    ):
        dtype, mask = next(dtypes), dict(next(masks))
        has_bits = mask.pop("bits", 0)
        tensors = {
            "query": torch.randn(2, queries, 4, dim, generator=g).to(dtype),
            "key": torch.randn(2, keys, 2, dim, generator=g).to(dtype),
            "value": torch.randn(2, keys, 2, value_dim, generator=g).to(dtype),
            "sinks": torch.rand(4, generator=g),
            "alibi_slopes": torch.rand(2, 4, generator=g),
            "global_tokens": torch.tensor([[3, -1], [1, 2]]),
        }
        seen = torch.rand(2, 1, queries, keys, generator=g) < 0.5
        for at_end in (False, True):
            inputs = {name: guarded(tensor, at_end) for name, tensor in tensors.items()}
            if has_bits:
                bits, blocks, shape = pumice.ops.pack_attention_mask(guarded(seen, at_end))
                bits, blocks = guarded(bits, at_end), guarded(blocks, at_end)
                mask["mask"] = pumice.ops.PackedMask(bits, blocks, shape)
            leaves = [inputs.pop(name).requires_grad_() for name in ("query", "key", "value")]
            out, lse = pumice.ops.flash_attention(*leaves, **inputs, **mask, return_lse=True)
            grads = torch.randn(out.shape, generator=g).to(dtype), torch.ones_like(lse)
            torch.autograd.backward((out, lse), tuple(guarded(x, at_end) for x in grads))
            mask.pop("mask", None)
            offsets = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (queries, keys)]
            pumice.ops.flash_attention_varlen(
                *(x.detach().flatten(0, 1) for x in leaves),
                *(guarded(x, at_end) for x in offsets),
                max_seqlen_q=queries,
                max_seqlen_k=keys,
                **inputs,
                **mask,
            )
            parts = out.detach()[None].expand(3, -1, -1, -1, -1), lse.detach()[None]
            pumice.ops.merge_attention(
                guarded(parts[0], at_end), guarded(parts[1].expand(3, -1, -1, -1), at_end)
            )


def paged() -> None:
    """Caches of every kind between pages of no access, the last block of the pool in use.

    A table ends with the sequence; its entries for a block that nobody sees are garbage.
    """
    g = torch.Generator().manual_seed(3)
    dtypes = itertools.cycle((torch.float32, torch.float16, torch.bfloat16))
    kinds = itertools.cycle((None, torch.float8_e4m3fn, torch.int8))
    masks = itertools.cycle(({}, {"causal": False}, {"window": (5, 0), "sink_tokens": 2}, {"t": 1}))
    dims = ((64, 64), (33, 17), (128, 40), (1, 5), (15, 100))
    for queries, size, (dim, value_dim) in itertools.product((1, 3, 40), (1, 3, 16, 64), dims):
        dtype, stored, mask = next(dtypes), next(kinds), dict(next(masks))
        keys, tree = (max(70, queries), queries + 2), mask.pop("t", 0)
        blocks = [-(-n // size) for n in keys]
        table = torch.full((2, max(blocks)), -(2**31), dtype=torch.int32)
        table[0, : blocks[0]] = torch.arange(blocks[0]) + blocks[1]
        table[1, : blocks[1]] = torch.arange(blocks[1])
        if "window" in mask and queries == 1:  # between the two sinks and the window
            table[0, -(-2 // size) : (keys[0] - 6) // size] = 2**31 - 1
        caches = [torch.randn(sum(blocks), size, 2, d, generator=g) for d in (dim, value_dim)]
        tensors = {
            "key_cache": caches[0].to(stored or dtype),
            "value_cache": caches[1].to(stored or dtype),
            "block_table": table,
            "seq_lens": torch.tensor(keys, dtype=torch.int32),
            "sinks": torch.rand(4, generator=g),
            "alibi_slopes": torch.rand(2, 4, generator=g),
        }
        if stored is not None:
            tensors |= {"k_scale": torch.rand(2, generator=g), "v_scale": torch.rand(1)}
        if tree:
            tensors["tree_mask"] = torch.full((2 * queries, -(-queries // 32)), -1).int()
        query = torch.randn(2, queries, 4, dim, generator=g).to(dtype)
        new = [torch.randn(4, 2, d, generator=g).to(dtype) for d in (dim, value_dim)]
        slots = torch.tensor([0, -1, sum(blocks) * size - 1, size])
        pairs = torch.tensor([[0, sum(blocks) - 1], [-1, 0]])
        angles = torch.rand(7, dim // 2, generator=g)
        for at_end in (False, True):
            inputs = {name: guarded(tensor, at_end) for name, tensor in tensors.items()}
            pumice.ops.paged_attention(guarded(query, at_end), **inputs, **mask)
            written = inputs["key_cache"], inputs["value_cache"]
            scales = {name: inputs.get(name) for name in ("k_scale", "v_scale")}
            rotary = None
            if dim > 1:
                positions = torch.tensor([6, 0, 1, 6])
                rotary = tuple(guarded(x, at_end) for x in (angles, angles, positions))
            pumice.ops.cache_append(
                *(guarded(x, at_end) for x in new), *written, guarded(slots, at_end),
                rotary=rotary, **scales,
            )  # fmt: skip
            pumice.ops.cache_copy_blocks(*written, guarded(pairs, at_end))


def sparse24() -> None:
    """Few rows and many, of every kind of weight."""
    g = torch.Generator().manual_seed(4)
    dtypes = itertools.cycle((torch.float32, torch.float16, torch.bfloat16))
    for m, n, k in itertools.product(
        (1, 3, 7, 13), (1, 5, 17), (4, 28, 36, 64, 132, 260, 516, 1028)
    ):
        dtype = next(dtypes)
        w = torch.randn(n, k // 4, 4, generator=g)
        w[..., 1:3] = 0
        w8 = (w.view(n, k) * 30).to(torch.int8)
        w = w.view(n, k).to(dtype)
        x = torch.randn(m, k, generator=g).to(dtype)
        q = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=g)
        codes = torch.randint(0, 16, (n, k // 2), dtype=torch.uint8, generator=g)
        scales = torch.rand(n, -(-k // 32), generator=g).to(dtype)
        bias, scale, weight_scale = torch.ones(n), torch.ones(m), torch.ones(n)
        for at_end in (False, True):
            compressed = pumice.ops.sparse24_compress(guarded(w, at_end))
            values, meta = (guarded(t, at_end) for t in compressed)
            values8, _ = pumice.ops.sparse24_compress(guarded(w8, at_end))
            pumice.ops.sparse24_gather(guarded(w, at_end), meta)
            pumice.ops.sparse24_decompress(values, meta)
            pumice.ops.sparse24_decompress(guarded(values8, at_end), meta)
            xs, qs, b = (guarded(t, at_end) for t in (x, q, bias))
            pumice.ops.sparse24_linear(xs, values, meta, b)
            scaling = [guarded(t, at_end) for t in (scale, weight_scale)]
            pumice.ops.sparse24_int8_linear(
                qs, scaling[0], guarded(values8, at_end), meta, scaling[1], b, out_dtype=dtype
            )
            for zeros in (None, scales, torch.ones(scales.shape, dtype=torch.uint8)):
                pumice.ops.sparse24_int4_linear(
                    xs,
                    guarded(pumice.ops.int4_pack(codes), at_end),
                    meta,
                    guarded(scales, at_end),
                    None if zeros is None else guarded(zeros, at_end),
                    b,
                    group_size=32,
                )


def sampling() -> None:
    g = torch.Generator().manual_seed(4)
    dtypes = itertools.cycle((torch.float32, torch.float16, torch.bfloat16))
    filters = itertools.cycle(
        ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 200, "top_p": 0.5})
    )
    for vocab in (1, 7, 17, 127, 128, 129, 300, 1031):
        x = (torch.randn(2, vocab, generator=g) * 3).to(next(dtypes))
        probs, u = x.float().softmax(-1), torch.rand(2, generator=g)
        tokens = torch.tensor([[vocab - 1]] * 2)
        for at_end in (False, True):
            for _ in range(5):
                options = next(filters)
                xs = guarded(x, at_end)
                pumice.ops.sampling_probs(xs, **options)
                pumice.ops.sample(xs, uniforms=guarded(u, at_end), **options)
            q, p = (guarded(t, at_end) for t in (probs[:, None], torch.stack([probs, probs], 1)))
            ones = guarded(torch.ones(2, 2), at_end)
            pumice.ops.speculative_verify(guarded(tokens, at_end), p, draft_probs=q, uniforms=ones)


def main() -> None:
    if sys.argv[1:] == ["past-the-end"]:  # the fault this program is about
        ctypes.string_at(guarded(torch.zeros(5), at_end=True).data_ptr(), 21)
    g = torch.Generator().manual_seed(0)
    dtypes = itertools.cycle((torch.float32, torch.float16, torch.bfloat16))
    for m, n, k in itertools.product((1, 5, 19), (1, 5, 8), (1, 15, 33, 64, 100, 515)):
        dtype = next(dtypes)
        x = (torch.randn(m, k, generator=g) * 3).to(dtype)
        q = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=g)
        qweight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
        vectors = (torch.rand(n, generator=g), torch.randn(n, generator=g).to(dtype))
        for at_end in (False, True):
            inputs = [guarded(t, at_end) for t in (x, q, torch.rand(m), qweight, *vectors)]
            xs, qs, scale, *weight = inputs
            pumice.ops.int8_quantize(xs, threshold=6.0, smooth=guarded(torch.rand(k), at_end))
            pumice.ops.int8_linear(qs, scale, *weight, out_dtype=dtype)
            pumice.ops.int8_mixed_linear(xs, *weight)
    int4()
    attention()
    paged()
    sparse24()
    sampling()
    print("done")


main()
