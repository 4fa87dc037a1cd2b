"""Group-wise quantized weights of 2, 3, 4 or 8 bits as a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumice.nn._checks import (
    FloatType,
    Zeros,
    check_grid,
    check_kinds,
    check_tensor,
    check_zeros,
    float_type_of,
    zeros_kind_of,
)
from pumice.nn._int4_checks import (
    INTEGERS,
    NAME,
    check_counts,
    check_outlier_idx,
    check_permutation,
    order_of,
)
from pumice.nn._linear import CompressedLinear
from pumice.ops import int4_dequantize, int4_linear, int4_pack


class Int4Linear(CompressedLinear):
    """A linear layer whose weight is stored in groups of low-bit integers.

    ::

        W[n, k] = (q[n, k] - zeros[n, g]) · scales[n, g]        g = k // group_size
        y[m, n] = Σ_k x[m, perm[k]] · W[n, k] + bias[n]
                + Σ_j x[m, outlier_idx[j]] · outlier_weight[n, j]
                + Σ_r (Σ_k x[m, k] · lora_a[r, k]) · lora_b[n, r]

    Activations keep their dtype, and the output has it too. ``perm`` is there for methods that
    choose groups of columns that are no neighbours (GPTQ's activation order): the columns are
    stored sorted by group, and the kernel reads x in that order. Columns that a method would not
    have quantized (OWQ's weak columns) are stored as they are in ``outlier_weight``, and are zero
    in W; ``lora_a`` and ``lora_b`` give back a part of what quantization took, as a product of low
    rank (ZeroQuant-V2). Gradients flow to the input and the bias, so adapters can be trained around
    the frozen weights.

    State dict: ``qweight`` int32 [out_features, ⌈K·bits/32⌉], each row a little-endian stream of
    bits; ``scales`` [out_features, G], G = ⌈K / group_size⌉; ``zeros`` uint8 [out_features, G]
    (or of the dtype of the scales, for fractional ones) unless ``zeros="none"``, which means
    2^(bits-1); ``perm`` int32 [in_features] where permuted; ``outlier_idx`` int32 [outliers] and
    ``outlier_weight`` [out_features, outliers]; ``lora_a`` [rank, in_features] and ``lora_b``
    [out_features, rank]; ``bias``.

    The values of ``zeros``, ``perm`` and ``outlier_idx`` are checked when the layer is made of them
    or loaded, so that no call has to: on CUDA that would mean waiting for the device.

    Args:
        in_features, out_features: K and N.
        bias: whether the layer has a bias.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale: a multiple of 16, or -1 for the whole row. The last
            group may be short.
        zeros_kind: "none" (symmetric), "integer" or "float".
        permuted: whether there is a ``perm``.
        scale_dtype: "float32", "float16" or "bfloat16".
        outliers: columns kept as they are; 0 for none.
        rank: of the low-rank term; 0 for none.
        dense_dtype: of ``outlier_weight``, ``lora_a`` and ``lora_b``.
        device: of all tensors.
        dtype: of the bias; the compressed tensors have dtypes of their own.

    Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", 2022; Lee, Jin, Kim, Kim, Park, "OWQ",
    2023; Yao, Wu, Li, Youn, He, "ZeroQuant-V2", 2023.
    """

    options = (
        "bits", "group_size", "zeros_kind", "permuted", "scale_dtype", "outliers", "rank",
        "dense_dtype",
    )  # fmt: skip
    later_options: ClassVar[dict[str, Any]] = {"outliers": 0, "rank": 0, "dense_dtype": "float16"}
    checked = ("zeros", "perm", "outlier_idx")

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    outlier_idx: Tensor | None
    outlier_weight: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        group_size: int = 128,
        zeros_kind: Zeros = "none",
        permuted: bool = False,
        scale_dtype: FloatType = "float16",
        outliers: int = 0,
        rank: int = 0,
        dense_dtype: FloatType = "float16",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        check_grid(NAME, bits, group_size, multiple=16)
        check_counts(outliers=outliers, rank=rank)
        check_kinds(NAME, zeros_kind, scale_dtype=scale_dtype, dense_dtype=dense_dtype)
        self.bits = bits
        self.group_size = group_size
        self.zeros_kind = zeros_kind
        self.permuted = bool(permuted)
        self.scale_dtype = scale_dtype
        self.outliers = outliers
        self.rank = rank
        self.dense_dtype = dense_dtype
        n, k = out_features, in_features
        groups = 1 if group_size == -1 else -(-k // group_size)
        floating, dense = getattr(torch, scale_dtype), getattr(torch, dense_dtype)
        zeros_dtype = torch.uint8 if zeros_kind == "integer" else floating

        def buffer(name: str, there: bool, *shape: int, dtype: torch.dtype) -> None:
            value = torch.zeros(shape, dtype=dtype, device=device) if there else None
            self.register_buffer(name, value)

        buffer("qweight", True, n, -(-k * bits // 32), dtype=torch.int32)
        buffer("scales", True, n, groups, dtype=floating)
        buffer("zeros", zeros_kind != "none", n, groups, dtype=zeros_dtype)
        self.register_buffer(
            "perm", torch.arange(k, dtype=torch.int32, device=device) if permuted else None
        )
        self.register_buffer(
            "outlier_idx",
            torch.arange(outliers, dtype=torch.int32, device=device) if outliers else None,
        )
        buffer("outlier_weight", outliers > 0, n, outliers, dtype=dense)
        buffer("lora_a", rank > 0, rank, k, dtype=dense)
        buffer("lora_b", rank > 0, n, rank, dtype=dense)

    @classmethod
    def from_quantized(
        cls,
        linear: nn.Linear,
        q: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        *,
        bits: int,
        group_size: int,
        perm: Tensor | None = None,
        g_idx: Tensor | None = None,
        outlier_idx: Tensor | None = None,
        outlier_weight: Tensor | None = None,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
    ) -> Int4Linear:
        """The layer that stands for ``linear`` with its weight quantized by some method.

        Args:
            linear: gives the shape, the bias and the mode; its weight is not read.
            q: uint8 [N, K], 0 … 2^bits - 1. In stored order if ``perm`` is given. Its outlier
                columns are not read.
            scales: floating [N, G].
            zeros: uint8 or floating [N, G], or None for 2^(bits-1).
            bits, group_size: see :class:`Int4Linear`.
            perm: int [K]: column k of q is that of input ``perm[k]``.
            g_idx: int [K], instead of ``perm``: the group of each column of q, which is then in
                the order of the inputs. Its groups must be full, save the last.
            outlier_idx: int [n_o], distinct inputs, whose weights are ``outlier_weight``. Not with
                floating zeros, for which no q means a weight of zero.
            outlier_weight: floating [N, n_o].
            lora_a, lora_b: floating [r, K] and [N, r], of the dtype of ``outlier_weight``.

        Raises:
            TypeError, ValueError: a tensor of the wrong dtype or shape, or values out of range.
        """
        n, k = linear.out_features, linear.in_features
        check_tensor(NAME, "q", q, (n, k), (torch.uint8,))
        if bits < 8 and bool((q >= 2**bits).any()):
            raise ValueError(
                f"Int4Linear: q holds values beyond {2**bits - 1}, the largest of {bits} bits"
            )
        for first, second in ((outlier_idx, outlier_weight), (lora_a, lora_b)):
            if (first is None) != (second is None):
                names = "lora_a and lora_b" if first is lora_a else "outlier_idx and outlier_weight"
                raise ValueError(f"Int4Linear: {names} belong together; pass both or none")
        if g_idx is not None:
            if perm is not None:
                raise ValueError("Int4Linear: pass perm or g_idx, not both")
            perm = order_of(g_idx, k, group_size)
            q = q if perm is None else q[:, perm.long()]
        dense = outlier_weight if outlier_weight is not None else lora_a
        layer = cls(
            k,
            n,
            linear.bias is not None,
            bits=bits,
            group_size=group_size,
            zeros_kind=zeros_kind_of(zeros),
            permuted=perm is not None,
            scale_dtype=float_type_of(NAME, "scales", scales),
            outliers=0 if outlier_weight is None else outlier_weight.shape[-1],
            rank=0 if lora_a is None else lora_a.shape[0],
            dense_dtype="float16"
            if dense is None
            else float_type_of(NAME, "outlier_weight", dense),
            device="meta",
            dtype=linear.weight.dtype,
        )
        given = {
            "scales": scales, "zeros": zeros, "perm": perm, "outlier_idx": outlier_idx,
            "outlier_weight": outlier_weight, "lora_a": lora_a, "lora_b": lora_b,
        }  # fmt: skip
        for name, tensor in given.items():
            layer._adopt(name, tensor)
        layer.check_values(given)
        if not bool(scales.isfinite().all()):
            raise ValueError("Int4Linear: scales hold NaN or infinite values")
        layer.qweight = int4_pack(layer._without_outliers(q), bits)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        return layer.train(linear.training)

    def _adopt(self, name: str, tensor: Tensor | None) -> None:
        """Make a given tensor the buffer of that name, if it is what the buffer is to be."""
        buffer = getattr(self, name)
        if tensor is None or buffer is None:
            return
        dtypes: tuple[torch.dtype, ...] = (buffer.dtype,)
        if buffer.dtype == torch.int32:
            dtypes = INTEGERS
        elif name == "zeros":
            dtypes = (torch.uint8, self.scales.dtype)
        check_tensor(NAME, name, tensor, tuple(buffer.shape), dtypes)
        setattr(self, name, tensor.detach().to(buffer.dtype).contiguous())

    def _without_outliers(self, q: Tensor) -> Tensor:
        """q with the zero point in the outlier columns, so that W is zero there."""
        if self.outlier_idx is None:
            return q
        columns = self.outlier_idx.long()
        if self.perm is not None:
            columns = self.perm.long().argsort()[columns]
        q = q.clone()
        if self.zeros is None:
            q[:, columns] = 1 << (self.bits - 1)
        elif self.zeros_kind == "integer":
            size = self.in_features if self.group_size == -1 else self.group_size
            q[:, columns] = self.zeros[:, columns // size]
        else:
            raise ValueError(
                "Int4Linear: outlier columns need zeros that are integers, for W = 0 in them; "
                f"these are {str(self.zeros.dtype).removeprefix('torch.')}"
            )
        return q

    def check_values(self, tensors: Mapping[str, Tensor | None]) -> None:
        zeros, perm, outlier_idx = (tensors.get(name) for name in self.checked)
        if zeros is not None and not zeros.is_meta:
            check_zeros(NAME, zeros, self.bits)
        if perm is not None and not perm.is_meta:
            check_permutation(perm, self.in_features)
        if outlier_idx is not None and not outlier_idx.is_meta:
            check_outlier_idx(outlier_idx, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return int4_linear(
            x,
            self.qweight,
            self.scales,
            self.zeros,
            perm=self.perm,
            bias=self.bias,
            outlier_idx=self.outlier_idx,
            outlier_weight=self.outlier_weight,
            lora_a=self.lora_a,
            lora_b=self.lora_b,
            group_size=self.group_size,
            bits=self.bits,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight of all terms [out_features, in_features], columns in the order of the inputs.

        Outlier columns and the low-rank product are added in fp32.
        """
        is_sum = self.outlier_idx is not None or self.lora_a is not None
        weight = int4_dequantize(
            self.qweight,
            self.scales,
            self.zeros,
            k=self.in_features,
            group_size=self.group_size,
            bits=self.bits,
            out_dtype=torch.float32 if is_sum else dtype,
        )
        if self.perm is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.perm.long(), weight)
        if self.outlier_idx is not None and self.outlier_weight is not None:
            weight.index_add_(1, self.outlier_idx.long(), self.outlier_weight.float())
        if self.lora_a is not None and self.lora_b is not None:
            weight += self.lora_b.float() @ self.lora_a.float()
        return weight.to(dtype)
