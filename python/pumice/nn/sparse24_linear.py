"""2:4 weights as a layer: floating-point, int8, or of a few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

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
from pumice.nn._linear import CompressedLinear, check_finite_scale, check_linear
from pumice.nn._sparse24_checks import (
    NAME,
    check_columns,
    check_kept,
    check_metadata,
    filled_codes,
)
from pumice.ops import (
    int4_dequantize,
    int4_pack,
    int8_quantize,
    sparse24_compress,
    sparse24_decompress,
    sparse24_gather,
    sparse24_int4_linear,
    sparse24_int8_linear,
    sparse24_linear,
)

Weights = Literal["float", "int8", "int4"]


class Sparse24Linear(CompressedLinear):
    """A linear layer that stores two of every four weights along K, and where they stood.

    ::

        "float"   W[n, c(n, j)] = values[n, j]                            y = x · Wᵀ + bias
        "int8"    W[n, c(n, j)] = values[n, j] · weight_scale[n]          y = (s · q) · Wᵀ + bias
        "int4"    W[n, c(n, j)] = (q[n, j] - zeros[n, g]) · scales[n, g]  y = x · Wᵀ + bias

    with c(n, j) the column of kept weight j (:mod:`pumice.ops.sparse`), g = c(n, j) // group_size
    and q, s = int8_quantize(x). The output has the dtype of the input. Gradients flow to the input
    and the bias, except with int8 weights, whose activations are rounded. To train the kept weights
    under their mask, call :func:`pumice.ops.sparse24_linear` with them as a parameter.

    State dict: ``metadata`` uint8 [out_features, ⌈K/32⌉·4] and

    - "float": ``values`` [out_features, K/2] of ``value_dtype``, which is that of the input. Alone
      among compressed weights they are cast with the module (``.half()``, ``.to(torch.bfloat16)``);
    - "int8": ``values`` int8 [out_features, K/2], ``weight_scale`` fp32 [out_features];
    - "int4": ``qvalues`` int32 [out_features, ⌈K/2·bits/32⌉], packed as by
      :func:`pumice.ops.int4_pack`; ``scales`` [out_features, G], G = ⌈K / group_size⌉; ``zeros`` as
      in :class:`Int4Linear`;

    and ``bias``. The values of ``metadata`` and ``zeros`` are checked when the layer is made or
    loaded.

    Args:
        in_features, out_features: K, a multiple of 4, and N.
        bias: whether the layer has a bias.
        weights: "float", "int8" or "int4".
        value_dtype: of "float" weights: "float32", "float16" or "bfloat16".
        bits: of "int4" weights: 4, or 2, 3 or 8.
        group_size: of "int4" weights: columns that share a scale, a multiple of 32, or -1.
        zeros_kind: of "int4" weights: "none" (symmetric), "integer" or "float".
        scale_dtype: of "int4" weights.
        device: of all tensors.
        dtype: of the bias.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021; with 4-bit weights
    Frantar and Alistarh, "SparseGPT", 2023.
    """

    options = ("weights", "value_dtype", "bits", "group_size", "zeros_kind", "scale_dtype")
    checked = ("metadata", "zeros")

    metadata: Tensor
    # None where weights are of another kind.
    values: Tensor
    weight_scale: Tensor
    qvalues: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weights: Weights = "float",
        value_dtype: FloatType = "bfloat16",
        bits: int = 4,
        group_size: int = 128,
        zeros_kind: Zeros = "none",
        scale_dtype: FloatType = "float16",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        check_columns(in_features)
        if weights not in get_args(Weights):
            raise ValueError(
                f"Sparse24Linear: weights must be one of {get_args(Weights)}, not {weights!r}"
            )
        check_grid(NAME, bits, group_size, multiple=32)
        check_kinds(NAME, zeros_kind, value_dtype=value_dtype, scale_dtype=scale_dtype)
        self.weights = weights
        self._value_dtype = value_dtype
        self.bits = bits
        self.group_size = group_size
        self.zeros_kind = zeros_kind
        self.scale_dtype = scale_dtype
        n, k = out_features, in_features
        groups = 1 if group_size == -1 else -(-k // group_size)
        scale = getattr(torch, scale_dtype)
        integers, packed = weights == "int8", weights == "int4"

        shapes: dict[str, tuple[bool, tuple[int, ...], torch.dtype]] = {
            "values": (
                not packed,
                (n, k // 2),
                torch.int8 if integers else getattr(torch, value_dtype),
            ),
            "weight_scale": (integers, (n,), torch.float32),
            "qvalues": (packed, (n, -(-k // 2 * bits // 32)), torch.int32),
            "scales": (packed, (n, groups), scale),
            "zeros": (
                packed and zeros_kind != "none",
                (n, groups),
                torch.uint8 if zeros_kind == "integer" else scale,
            ),
        }
        # Columns 0 and 1 of every group. (An exported module cannot have a buffer "meta".)
        metadata = torch.full((n, -(-k // 32) * 4), 0x44, dtype=torch.uint8, device=device)
        self.register_buffer("metadata", metadata)
        # Absent ones last: torch.export counts them wrongly among the others.
        for name, (there, shape, buffer_type) in sorted(shapes.items(), key=lambda i: not i[1][0]):
            value = torch.zeros(shape, dtype=buffer_type, device=device) if there else None
            self.register_buffer(name, value)

    @property
    def value_dtype(self) -> str:
        """Of floating-point values, which the module's casts change."""
        if self.weights == "float":
            return str(self.values.dtype).removeprefix("torch.")
        return self._value_dtype

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, weights: Literal["float", "int8"] = "float"
    ) -> Sparse24Linear:
        """The layer that stands for ``linear``, whose weight is 2:4.

        Args:
            linear: with a weight in fp32, fp16 or bf16. It is left as it is.
            weights: "float" keeps its dtype, "int8" rounds it with a scale for each output.

        Raises:
            TypeError: not an nn.Linear, or a weight of another dtype.
            ValueError: a weight that is not 2:4 (row and group are named) or has no multiple of 4
                columns; for int8, one that holds NaN or infinities.
        """
        weight = check_linear(linear, cls.__name__)
        if weights == "int8":
            q, scale, _ = int8_quantize(weight)
            check_finite_scale(scale, weight, cls.__name__)
            return cls.from_int8(linear, q, scale)
        if weights != "float":
            raise ValueError(
                f"{cls.__name__}: from_linear makes weights of 'float' or 'int8', not {weights!r}"
            )
        return cls.from_dense(linear, weight)

    @classmethod
    def from_dense(cls, linear: nn.Linear, weight: Tensor) -> Sparse24Linear:
        """The layer that stands for ``linear`` with another weight: floating [N, K], 2:4.

        Raises:
            TypeError, ValueError: see :meth:`from_linear`.
        """
        value_dtype = float_type_of(NAME, "weight", weight)
        layer = cls._shaped_as(linear, weights="float", value_dtype=value_dtype)
        check_tensor(
            NAME, "weight", weight, (linear.out_features, linear.in_features), (weight.dtype,)
        )
        layer.values, layer.metadata = sparse24_compress(weight.detach())
        return layer

    @classmethod
    def from_int8(cls, linear: nn.Linear, q: Tensor, weight_scale: Tensor) -> Sparse24Linear:
        """The layer that stands for ``linear`` with int8 weights.

        Args:
            linear: gives the shape, the bias and the mode; its weight is not read.
            q: int8 [N, K], 2:4.
            weight_scale: fp32 [N].

        Raises:
            TypeError, ValueError: a tensor of the wrong dtype or shape; q is not 2:4.
        """
        layer = cls._shaped_as(linear, weights="int8")
        check_tensor(NAME, "q", q, (linear.out_features, linear.in_features), (torch.int8,))
        check_tensor(NAME, "weight_scale", weight_scale, (linear.out_features,), (torch.float32,))
        layer.values, layer.metadata = sparse24_compress(q)
        layer.weight_scale = weight_scale.detach().contiguous()
        return layer

    @classmethod
    def from_quantized(
        cls,
        linear: nn.Linear,
        q: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        mask: Tensor,
        *,
        bits: int = 4,
        group_size: int,
    ) -> Sparse24Linear:
        """The layer that stands for ``linear``, pruned and quantized by some method.

        Args:
            linear: gives the shape, the bias and the mode; its weight is not read.
            q: uint8 [N, K], 0 … 2^bits - 1, read where the mask is set.
            scales: floating [N, G], G = ⌈K / group_size⌉.
            zeros: uint8 or floating [N, G], or None for 2^(bits-1).
            mask: bool [N, K], True where a weight is kept: at most two of every four along K, and
                with floating zeros, for which no q means a weight of zero, exactly two.
            bits, group_size: see :class:`Sparse24Linear`.

        Raises:
            TypeError, ValueError: a tensor of the wrong dtype or shape, or values out of range.
        """
        shape = (linear.out_features, linear.in_features)
        check_tensor(NAME, "q", q, shape, (torch.uint8,))
        check_tensor(NAME, "mask", mask, shape, (torch.bool,))
        layer = cls._shaped_as(
            linear,
            weights="int4",
            bits=bits,
            group_size=group_size,
            zeros_kind=zeros_kind_of(zeros),
            scale_dtype=float_type_of(NAME, "scales", scales),
        )
        for name, tensor in (("scales", scales), ("zeros", zeros)):
            buffer = getattr(layer, name)
            if tensor is not None:
                check_tensor(NAME, name, tensor, tuple(buffer.shape), (buffer.dtype,))
                setattr(layer, name, tensor.detach().contiguous())
        if not bool(scales.isfinite().all()):
            raise ValueError("Sparse24Linear: scales hold NaN or infinite values")
        if zeros is not None:
            check_zeros(NAME, zeros, bits)
        check_kept(mask, exactly_two=zeros is not None and zeros.is_floating_point())
        codes = filled_codes(q, mask, zeros, bits, group_size)
        _, layer.metadata = sparse24_compress(mask.to(torch.int8))
        kept = sparse24_gather(codes.view(torch.int8), layer.metadata)
        layer.qvalues = int4_pack(kept.view(torch.uint8), bits)
        return layer

    @classmethod
    def _shaped_as(cls, linear: nn.Linear, **options: Any) -> Sparse24Linear:
        """A layer of the shape, mode and bias of another, its buffers of "meta" tensors."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
            **options,
        )
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        return layer.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The stored values, for code that peeks at the device or dtype of ``linear.weight``.

        They are not the weight of the product: see :meth:`dequantize`.
        """
        return self.get_buffer("qvalues" if self.weights == "int4" else "values")

    def check_values(self, tensors: Mapping[str, Tensor | None]) -> None:
        metadata, zeros = (tensors.get(name) for name in self.checked)
        if metadata is not None and not metadata.is_meta:
            check_metadata(metadata, self.in_features)
        if zeros is not None and not zeros.is_meta:
            check_zeros(NAME, zeros, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        if self.weights == "float":
            return sparse24_linear(x, self.values, self.metadata, self.bias)
        if self.weights == "int8":
            q, scale, _ = int8_quantize(x)
            return sparse24_int8_linear(
                q,
                scale,
                self.values,
                self.metadata,
                self.weight_scale,
                self.bias,
                out_dtype=x.dtype,
            )
        return sparse24_int4_linear(
            x,
            self.qvalues,
            self.metadata,
            self.scales,
            self.zeros,
            self.bias,
            group_size=self.group_size,
            bits=self.bits,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.weights == "float":
            return sparse24_decompress(self.values, self.metadata).to(dtype)
        if self.weights == "int8":
            weight = sparse24_decompress(self.values, self.metadata) * self.weight_scale.unsqueeze(
                1
            )
            return weight.to(dtype)
        kept = int4_dequantize(
            self.qvalues,
            self.scales,
            self.zeros,
            k=self.in_features // 2,
            group_size=-1 if self.group_size == -1 else self.group_size // 2,
            bits=self.bits,
            out_dtype=dtype,
        )
        return sparse24_decompress(kept, self.metadata)

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"bias={self.bias is not None}",
            f"weights={self.weights!r}",
        ]
        shown = {"float": ("value_dtype",), "int8": ()}.get(self.weights, self.options[2:])
        return ", ".join(parts + [f"{name}={getattr(self, name)!r}" for name in shown])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sparse24Linear:
        if self.weights == "float":  # the dtype of the values is that of the model
            nn.Module._apply(self, fn, recurse)
            return self
        return super()._apply(fn, recurse)
