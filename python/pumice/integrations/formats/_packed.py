"""The form that every format is read into and written from: our packing, columns in input order.

It is the layout of the operators (``csrc/common/intn_layout.h``)::

    qweight  int32 [N, ceil(K·b/32)]   row n: a little-endian bit stream of q[n, k] ∈ [0, 2^b)
    W[n, k] = (q[n, k] - zeros[n, g]) · scales[n, g]       g = g_idx[k], or k // group_size

so that a conversion moves bits and rounds nothing: reading and writing are exact inverses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pumice.nn import Int4Linear, Sparse24Linear
from pumice.ops import int4_dequantize, int4_pack, int4_unpack, sparse24_decompress


def words(count: int, bits: int) -> int:
    """int32 words of a stream of ``count`` values."""
    return -(-count * bits // 32)


def groups(k: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-k // group_size)


def sequential_groups(k: int, group_size: int, device: torch.device) -> Tensor:
    """int32 [k]: the group of each column where groups are neighbours."""
    size = k if group_size == -1 else group_size
    return torch.arange(k, dtype=torch.int32, device=device) // size


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight [N, K], its columns in the order of the inputs.

    Attributes:
        qweight: int32 [N, ceil(K · bits / 32)].
        scales: floating [N, G].
        zeros: uint8 [N, G], or None for 2^(bits-1) everywhere; floating only when it comes from a
            layer (no foreign format here can hold that).
        g_idx: int32 [K], the group of each column, or None for k // group_size.
        k, bits, group_size: K; 2, 3, 4 or 8; -1 or a multiple of 16.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    g_idx: Tensor | None
    k: int
    bits: int
    group_size: int

    @property
    def n(self) -> int:
        return self.qweight.shape[0]

    def unpack(self) -> Tensor:
        """q: uint8 [N, K]."""
        return int4_unpack(self.qweight, self.k, self.bits)

    def full_zeros(self) -> Tensor:
        """The zero points, uint8 [N, G], also where they are left out."""
        if self.zeros is None:
            middle = 1 << (self.bits - 1)
            return torch.full_like(self.scales, middle, dtype=torch.uint8)
        if self.zeros.dtype != torch.uint8:
            raise ValueError("its zero points are fractional, and the format holds integers only")
        return self.zeros

    def full_g_idx(self) -> Tensor:
        """The group of each column, int32 [K], also where it is left out."""
        if self.g_idx is not None:
            return self.g_idx
        return sequential_groups(self.k, self.group_size, self.qweight.device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return int4_dequantize(
            self.qweight,
            self.scales,
            self.zeros,
            self.g_idx,
            k=self.k,
            group_size=self.group_size,
            bits=self.bits,
            out_dtype=dtype,
        )

    def to_layer(self, linear: nn.Linear) -> Int4Linear:
        """The layer that stands for ``linear`` with this weight; of it only the bias is kept.

        With ``g_idx`` the columns are sorted by group, and the layer reads its input in that order.

        Raises:
            ValueError: groups of unequal sizes, or of a size the layer does not take.
        """
        qweight, perm = self.qweight, None
        if self.g_idx is not None:
            perm = _order(self.g_idx, self.k, self.group_size)
            qweight = int4_pack(self.unpack()[:, perm].contiguous(), self.bits)
        layer = Int4Linear(
            self.k,
            self.n,
            linear.bias is not None,
            bits=self.bits,
            group_size=self.group_size,
            zeros_kind="none" if self.zeros is None else "integer",
            permuted=perm is not None,
            scale_dtype=str(self.scales.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            device="meta",
            dtype=linear.weight.dtype if linear.bias is None else linear.bias.dtype,
        )
        layer.qweight, layer.scales, layer.zeros = qweight, self.scales, self.zeros
        layer.perm = None if perm is None else perm.to(torch.int32)
        layer.bias = linear.bias
        return layer.train(linear.training)

    @classmethod
    def from_sparse(cls, layer: Sparse24Linear) -> PackedWeight:
        """The weight of a 2:4 layer of integers, with zero points where nothing is kept.

        Raises:
            ValueError: fractional zero points, for which no integer means a weight of zero.
        """
        k, size = layer.in_features, layer.group_size
        kept = int4_unpack(layer.qvalues, k // 2, layer.bits)
        # int8 is what is decompressed; codes of 8 bits wrap around and back.
        q = sparse24_decompress(kept.view(torch.int8), layer.metadata).view(torch.uint8)
        there = sparse24_decompress(torch.ones_like(kept, dtype=torch.int8), layer.metadata) != 0
        dense = cls(layer.qvalues, layer.scales, layer.zeros, None, k, layer.bits, size)
        gone = dense.full_zeros()[:, sequential_groups(k, size, q.device).long()]
        packed = int4_pack(torch.where(there, q, gone), layer.bits)
        return cls(packed, layer.scales, layer.zeros, None, k, layer.bits, size)

    @classmethod
    def from_layer(cls, layer: Int4Linear) -> PackedWeight:
        """The weight of a layer, its columns put back in the order of the inputs.

        Raises:
            ValueError: a layer with outlier columns or a low-rank term, which no format here has.
        """
        for term, count in (("outlier columns", layer.outliers), ("a low-rank term", layer.rank)):
            if count:
                raise ValueError(f"it has {term}, for which the format has no place")
        qweight, g_idx = layer.qweight, None
        if layer.perm is not None:
            perm = layer.perm.long()
            stored = int4_unpack(qweight, layer.in_features, layer.bits)
            q = torch.empty_like(stored)
            q[:, perm] = stored
            qweight = int4_pack(q, layer.bits)
            sequence = sequential_groups(layer.in_features, layer.group_size, qweight.device)
            g_idx = torch.empty_like(sequence)
            g_idx[perm] = sequence
            if torch.equal(g_idx, sequence):
                g_idx = None
        return cls(
            qweight,
            layer.scales,
            layer.zeros,
            g_idx,
            layer.in_features,
            layer.bits,
            layer.group_size,
        )


def middle_or_zeros(zeros: Tensor, bits: int) -> Tensor | None:
    """None for zero points that are all 2^(b-1): the kernels know that one."""
    return None if bool((zeros == 1 << (bits - 1)).all()) else zeros.contiguous()


def _order(g_idx: Tensor, k: int, group_size: int) -> Tensor:
    """Columns sorted by group, in each group as they come: int64 [K]."""
    sorted_groups, order = g_idx.long().sort(stable=True)
    if not torch.equal(sorted_groups.int(), sequential_groups(k, group_size, g_idx.device)):
        raise ValueError(
            f"g_idx must give every group {group_size} columns, save the last, but the groups have "
            f"{g_idx.long().bincount().tolist()[:8]} …"
        )
    return order
