"""torch's semi-structured tensors: ``torch.sparse.to_sparse_semi_structured``, both ways.

torch has two layouts. CUTLASS's is documented and made here on any device: the values of
:func:`pumice.ops.sparse24_compress` in ``packed``, and ``meta`` as words of 16 bits (32 for int8
weights), four groups of four columns in each 16 bits, a group's nibble as ours. The words of N rows
and C columns are reordered as sparse tensor cores load them:

    1. of every 32 rows (16 for int8), row 8·a + b goes to place a + b·(32/8): threads of a warp
       that hold neighbouring rows read neighbouring words;
    2. every 2 × 2 words are transposed;
    3. pairs of columns are stored one after the other, each with all its rows.

cuSPARSELt's tensors hold the values, then the metadata, in one buffer, and NVIDIA keeps the layout
of the metadata to itself, for it may change at any time (github.com/NVIDIA/CUDALibrarySamples,
issue 167; what torch's own ``prune_dense_static_sort`` writes there was found by experiment). So
they are read through torch, on the GPU, by a product with the identity, which is exact, and written
by torch: ``torch.sparse.to_sparse_semi_structured(pumice.ops.sparse24_decompress(values, meta))``.

Of float32 torch keeps one of every *two* weights, which 2:4 ones need not fit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumice.ops import sparse24_compress, sparse24_decompress

# Rows that are interleaved, and dtype of the words, by dtype of the weight. The number of columns
# is a multiple of 64 (128 for int8) where torch multiplies with it.
_LAYOUTS = {
    torch.float16: (32, torch.int16, 64),
    torch.bfloat16: (32, torch.int16, 64),
    torch.int8: (16, torch.int32, 128),
}
_NAME = "to_semi_structured"


def to_semi_structured(values: Tensor, meta: Tensor) -> Any:
    """A ``torch.sparse.SparseSemiStructuredTensorCUTLASS`` of a 2:4 weight, on its device.

    It can be made on the CPU, too; torch multiplies with it on CUDA only. For one of cuSPARSELt see
    the module's docstring.

    Args:
        values: fp16, bf16 or int8 [N, K/2], N a multiple of 32 (int8: 16), K of 64 (int8: 128).
        meta: see :func:`pumice.ops.sparse24_compress`.

    Raises:
        ValueError: a shape or dtype that torch does not take.
    """
    if values.dtype not in _LAYOUTS:
        raise ValueError(
            f"{_NAME}: values must be float16, bfloat16 or int8, not "
            f"{str(values.dtype).removeprefix('torch.')}"
            + (
                " (of float32 torch keeps one of every two, not two of four)"
                if values.dtype == torch.float32
                else ""
            )
        )
    rows, word, columns = _LAYOUTS[values.dtype]
    n, k = values.shape[0], 2 * values.shape[1]
    if n % rows or k % columns:
        raise ValueError(
            f"{_NAME}: torch takes {str(values.dtype).removeprefix('torch.')} weights of a "
            f"multiple of {rows} rows and {columns} columns, not {[n, k]}"
        )
    words = _reorder(meta.contiguous().view(word), rows)
    return torch.sparse.SparseSemiStructuredTensorCUTLASS(
        torch.Size((n, k)),
        packed=values.contiguous(),
        meta=words,
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
    )


def from_semi_structured(tensor: Any) -> tuple[Tensor, Tensor]:
    """Values and metadata of :func:`pumice.ops.sparse24_compress` from torch's tensor.

    Args:
        tensor: what ``torch.sparse.to_sparse_semi_structured`` returns: CUTLASS's on any device,
            cuSPARSELt's (fp16, bf16, int8; finite) on its GPU.

    Raises:
        TypeError: it is no such tensor.
        ValueError: it holds its transpose alone; or it is cuSPARSELt's and not on a GPU, of another
            dtype, or holds NaN or infinities.
    """
    if not isinstance(
        tensor,
        (
            torch.sparse.SparseSemiStructuredTensorCUTLASS,
            torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        ),
    ):
        raise TypeError(
            f"from_semi_structured: expected torch's SparseSemiStructuredTensor, not "
            f"{type(tensor).__name__}"
        )
    if tensor.packed is None:
        raise ValueError(
            "from_semi_structured: the tensor holds its transpose alone; pass tensor.t()"
        )
    # By class: cuSPARSELt's may have a meta as well, a view of what follows the values.
    if isinstance(tensor, torch.sparse.SparseSemiStructuredTensorCUSPARSELT):
        return sparse24_compress(_dense_of_cusparselt(tensor))
    assert tensor.meta is not None
    if tensor.packed.dtype == torch.float32:
        return sparse24_compress(_dense_of_float32(tensor.packed, tensor.meta))
    rows, word, _ = _LAYOUTS[tensor.packed.dtype]
    nibbles = _restore(tensor.meta.view(word), rows).contiguous().view(torch.uint8)
    # Canonical again: torch fills groups of fewer nonzeros otherwise.
    return sparse24_compress(sparse24_decompress(tensor.packed.contiguous(), nibbles))


def _reorder(words: Tensor, rows: int) -> Tensor:
    n, c = words.shape
    interleaved = words.view(-1, rows // 8, 8, c).transpose(1, 2).reshape(n, c)
    # [i, p, j, s] is row 2i + p, column 2j + s; transposed, and pairs of columns outermost.
    pairs = interleaved.view(n // 2, 2, c // 2, 2)
    return pairs.permute(2, 0, 3, 1).reshape(n, c)


def _restore(stored: Tensor, rows: int) -> Tensor:
    n, c = stored.shape
    pairs = stored.reshape(c // 2, n // 2, 2, 2).permute(1, 3, 0, 2).reshape(n, c)
    return pairs.view(-1, 8, rows // 8, c).transpose(1, 2).reshape(n, c)


def _dense_of_cusparselt(tensor: Any) -> Tensor:
    """tensor · I, computed by torch."""
    if tensor.dtype not in _LAYOUTS:
        raise ValueError(
            f"from_semi_structured: a cuSPARSELt tensor must be float16, bfloat16 or int8, not "
            f"{str(tensor.dtype).removeprefix('torch.')}"
        )
    if not tensor.is_cuda:
        raise ValueError(
            "from_semi_structured: how cuSPARSELt lays out metadata is not public, so its tensors "
            f"are read by a product on the GPU, and this one is on {tensor.device}; move it to its "
            "GPU, or there pass sparse24_compress the dense weight, tensor.to_dense()"
        )
    k = tensor.shape[1]
    # Transposed, it is the same matrix in columns: int8 is multiplied in no other order.
    identity = torch.eye(k, dtype=tensor.dtype, device=tensor.device).t()
    dense: Tensor = torch.mm(tensor, identity)
    if not bool(dense.isfinite().all()):
        raise ValueError(
            "from_semi_structured: the weight holds NaN or infinite values, which the product that "
            "reads a cuSPARSELt tensor spreads over the row; compress the dense weight instead"
        )
    return dense


def _dense_of_float32(packed: Tensor, meta: Tensor) -> Tensor:
    """One of every two weights; its nibble names two 16-bit halves, 0 1 or 2 3."""
    nibbles = _restore(meta.view(torch.int16), 32).contiguous().view(torch.uint8)
    places = torch.stack((nibbles & 0xF, nibbles >> 4), 2).flatten(1) & 3
    pairs = packed.new_zeros(*packed.shape, 2)
    pairs.scatter_(2, (places // 2).long().unsqueeze(2), packed.unsqueeze(2))
    return pairs.flatten(1)
