"""Group-wise quantized weights of 2, 3, 4 or 8 bits as a layer."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pumice.nn._linear import CompressedLinear
from pumice.ops import int4_dequantize, int4_linear, int4_pack

Zeros = Literal["none", "integer", "float"]
ScaleType = Literal["float32", "float16", "bfloat16"]


class Int4Linear(CompressedLinear):
    """A linear layer whose weight is stored in groups of low-bit integers.

    ::

        W[n, k] = (q[n, k] - zeros[n, g]) · scales[n, g]        g = k // group_size
        y[m, n] = Σ_k x[m, perm[k]] · W[n, k] + bias[n]

    Activations keep their dtype, and the output has it too. ``perm`` is there for methods that
    choose groups of columns that are no neighbours (GPTQ's activation order): the columns are
    stored sorted by group, and the kernel reads x in that order. Gradients flow to the input and
    the bias, so adapters can be trained around the frozen weights.

    State dict: ``qweight`` int32 [out_features, ⌈K·bits/32⌉], each row a little-endian stream of
    bits; ``scales`` [out_features, G], G = ⌈K / group_size⌉; ``zeros`` uint8 [out_features, G]
    (or of the dtype of the scales, for fractional ones) unless ``zeros="none"``, which means
    2^(bits-1); ``perm`` int32 [in_features] where permuted; ``bias``.

    Args:
        in_features, out_features: K and N.
        bias: whether the layer has a bias.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale: a multiple of 16, or -1 for the whole row. The last
            group may be short.
        zeros: "none" (symmetric), "integer" or "float".
        permuted: whether there is a ``perm``.
        scale_dtype: "float32", "float16" or "bfloat16".
        device: of all tensors.
        dtype: of the bias; the compressed tensors have dtypes of their own.
    """

    options = ("bits", "group_size", "zeros_kind", "permuted", "scale_dtype")

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None

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
        scale_dtype: ScaleType = "float16",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        _check_options(bits, group_size, zeros_kind, scale_dtype)
        self.bits = bits
        self.group_size = group_size
        self.zeros_kind = zeros_kind
        self.permuted = bool(permuted)
        self.scale_dtype = scale_dtype
        groups = 1 if group_size == -1 else -(-in_features // group_size)
        words = -(-in_features * bits // 32)
        floating = getattr(torch, scale_dtype)
        zeros_dtype = torch.uint8 if zeros_kind == "integer" else floating

        def buffer(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.register_buffer("qweight", buffer(out_features, words, dtype=torch.int32))
        self.register_buffer("scales", buffer(out_features, groups, dtype=floating))
        self.register_buffer(
            "zeros",
            None if zeros_kind == "none" else buffer(out_features, groups, dtype=zeros_dtype),
        )
        self.register_buffer(
            "perm",
            torch.arange(in_features, dtype=torch.int32, device=device) if permuted else None,
        )

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
    ) -> Int4Linear:
        """The layer that stands for ``linear`` with its weight quantized by some method.

        Args:
            linear: gives the shape, the bias and the mode; its weight is not read.
            q: uint8 [N, K], 0 … 2^bits - 1. In stored order if ``perm`` is given.
            scales: floating [N, G].
            zeros: uint8 or floating [N, G], or None for 2^(bits-1).
            bits, group_size: see :class:`Int4Linear`.
            perm: int [K]: column k of q is that of input ``perm[k]``.
            g_idx: int [K], instead of ``perm``: the group of each column of q, which is then in
                the order of the inputs. Its groups must be full, save the last.

        Raises:
            TypeError, ValueError: a tensor of the wrong dtype or shape, or values out of range.
        """
        name = cls.__name__
        n, k = linear.out_features, linear.in_features
        _check_shape(name, "q", q, (n, k), (torch.uint8,))
        if bool((q >= 2**bits).any()) if bits < 8 else False:
            raise ValueError(
                f"{name}: q holds values beyond {2**bits - 1}, the largest of {bits} bits"
            )
        if g_idx is not None:
            if perm is not None:
                raise ValueError(f"{name}: pass perm or g_idx, not both")
            perm = _order_of(name, g_idx, k, group_size)
            q = q if perm is None else q[:, perm.long()]
        floating = (torch.float32, torch.float16, torch.bfloat16)
        layer = cls(
            k,
            n,
            linear.bias is not None,
            bits=bits,
            group_size=group_size,
            zeros_kind=_zeros_kind(zeros),
            permuted=perm is not None,
            scale_dtype=_dtype_name(scales),
            device="meta",
            dtype=linear.weight.dtype,
        )
        groups = tuple(layer.scales.shape)
        _check_shape(name, "scales", scales, groups, floating)
        if not bool(scales.isfinite().all()):
            raise ValueError(f"{name}: scales hold NaN or infinite values")
        if zeros is not None:
            _check_shape(name, "zeros", zeros, groups, (torch.uint8, scales.dtype))
            layer.zeros = zeros.detach().contiguous()
        if perm is not None:
            _check_shape(name, "perm", perm, (k,), (torch.int32, torch.int64))
            if not torch.equal(perm.long().sort().values, torch.arange(k, device=perm.device)):
                raise ValueError(f"{name}: perm is not a permutation of 0 … {k - 1}")
            layer.perm = perm.to(torch.int32)
        layer.qweight = int4_pack(q, bits)
        layer.scales = scales.detach().contiguous()
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return int4_linear(
            x,
            self.qweight,
            self.scales,
            self.zeros,
            perm=self.perm,
            bias=self.bias,
            group_size=self.group_size,
            bits=self.bits,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(q - zeros) · scales [out_features, in_features], columns in the order of the inputs."""
        weight = int4_dequantize(
            self.qweight,
            self.scales,
            self.zeros,
            k=self.in_features,
            group_size=self.group_size,
            bits=self.bits,
            out_dtype=dtype,
        )
        if self.perm is None:
            return weight
        ordered = torch.empty_like(weight)
        ordered[:, self.perm.long()] = weight
        return ordered


def _check_options(bits: object, group_size: object, zeros_kind: object, scale: object) -> None:
    name = "Int4Linear"
    if bits not in (2, 3, 4, 8) or isinstance(bits, bool):
        raise ValueError(f"{name}: bits must be 2, 3, 4 or 8, not {bits!r}")
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise TypeError(f"{name}: group_size must be an integer, not {group_size!r}")
    if group_size != -1 and (group_size < 16 or group_size % 16):
        raise ValueError(f"{name}: group_size must be -1 or a multiple of 16, not {group_size}")
    for argument, value, accepted in (
        ("zeros_kind", zeros_kind, get_args(Zeros)),
        ("scale_dtype", scale, get_args(ScaleType)),
    ):
        if value not in accepted:
            raise ValueError(f"{name}: {argument} must be one of {accepted}, not {value!r}")


def _check_shape(
    layer: str, name: str, value: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if value.dtype not in dtypes:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{layer}: {name} must be {accepted}, not {str(value.dtype)[6:]}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{layer}: {name} must have shape {list(shape)}, not {list(value.shape)}")


def _zeros_kind(zeros: Tensor | None) -> Zeros:
    if zeros is None:
        return "none"
    return "integer" if zeros.dtype == torch.uint8 else "float"


def _dtype_name(scales: Tensor) -> ScaleType:
    name = str(scales.dtype).removeprefix("torch.")
    if name not in get_args(ScaleType):
        raise TypeError(f"Int4Linear: scales must be float32, float16 or bfloat16, not {name}")
    return name  # type: ignore[return-value]


def _order_of(name: str, g_idx: Tensor, k: int, group_size: int) -> Tensor | None:
    """The columns sorted by group, or None where they are already."""
    if g_idx.dtype not in (torch.int32, torch.int64) or g_idx.shape != (k,):
        raise ValueError(
            f"{name}: g_idx must be int32 or int64 [{k}], not {g_idx.dtype} {list(g_idx.shape)}"
        )
    size = k if group_size == -1 else group_size
    stored = torch.arange(k, device=g_idx.device) // size
    groups, order = g_idx.long().sort(stable=True)
    if not torch.equal(groups, stored):
        raise ValueError(
            f"{name}: g_idx must give every group {size} columns, save the last; sorted groups of "
            "other sizes cannot be stored"
        )
    return None if torch.equal(g_idx.long(), stored) else order.to(torch.int32)
