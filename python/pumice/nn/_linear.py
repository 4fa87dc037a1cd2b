"""What every compressed linear layer shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pumice.ops._checks import FLOATING, MAX_INT8_K

Self = TypeVar("Self", bound="CompressedLinear")

# Compressed layers by the name under which a checkpoint stores them: their class name.
LAYER_TYPES: dict[str, type[CompressedLinear]] = {}


class CompressedLinear(nn.Module, ABC):
    """A drop-in for ``nn.Linear`` whose weight is stored compressed, in buffers.

    Buffers, not parameters, because a compressed weight is frozen. The dtype of a buffer is part of
    its format: ``.half()``, ``.to(torch.bfloat16)`` and the like cast the bias alone.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    # Names of the constructor's keyword options that describe the layer, stored in checkpoints.
    options: ClassVar[tuple[str, ...]] = ()
    # Options that older checkpoints lack, and what that means.
    later_options: ClassVar[dict[str, Any]] = {}
    # Names of the buffers whose values check_values looks at.
    checked: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        LAYER_TYPES[cls.__name__] = cls

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {argument} must be a positive integer, not {value!r}")
        if in_features > MAX_INT8_K:
            raise ValueError(
                f"{name}: in_features is {in_features}; beyond {MAX_INT8_K} int32 sums can overflow"
            )
        self.in_features = in_features
        self.out_features = out_features
        if bias:
            dtype = torch.get_default_dtype() if dtype is None else dtype
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out_features, in_features] that the layer multiplies with, made anew."""

    def check_values(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Refuse tensors, by buffer name, with which a kernel would read foreign memory.

        Called once, when the layer is filled: kernels on CUDA do not look.

        Raises:
            ValueError: a value out of range; the tensor is named.
        """

    @property
    def weight(self) -> Tensor:
        """The stored weight, for code that peeks at the device or shape of ``linear.weight``.

        It is not the weight of the product: see :meth:`dequantize`.
        """
        stored: Tensor = self.get_buffer("qweight")
        return stored

    def config(self) -> dict[str, Any]:
        """All that :func:`layer_from_config` needs to build this layer, without its tensors."""
        return {
            "type": type(self).__name__,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            **{name: getattr(self, name) for name in self.options},
        }

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"bias={self.bias is not None}",
        ]
        return ", ".join(parts + [f"{name}={getattr(self, name)!r}" for name in self.options])

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stored = {id(buffer): buffer.dtype for buffer in self.buffers(recurse=False)}

        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            dtype = stored.get(id(tensor), result.dtype)
            return result if result.dtype == dtype else tensor.to(result.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # copy_ would cast in silence: a float "qweight" truncates to nonsense.
        for name, buffer in self.named_buffers(recurse=False):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.dtype != buffer.dtype:
                raise TypeError(
                    f"{type(self).__name__}: {prefix + name} must be {buffer.dtype}, but the state "
                    f"dict holds {given.dtype}"
                )
        given = {name: state_dict.get(prefix + name) for name in self.checked}
        self.check_values({n: t for n, t in given.items() if isinstance(t, Tensor)})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a layer, with what older checkpoints did not have to say."""
    layer_type = LAYER_TYPES.get(config.get("type", ""))
    return {**(layer_type.later_options if layer_type else {}), **config}


def layer_from_config(
    config: dict[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CompressedLinear:
    """The layer that :meth:`CompressedLinear.config` described, its tensors zero."""
    options = complete_config(config)
    type_name = options.pop("type", None)
    if type_name not in LAYER_TYPES:
        raise ValueError(
            f"unknown layer type {type_name!r}; this version of pumice knows {sorted(LAYER_TYPES)}"
        )
    layer_type = LAYER_TYPES[type_name]
    accepted = {"in_features", "out_features", "bias", *layer_type.options}
    if options.keys() != accepted:
        wrong = sorted(options.keys() ^ accepted)
        raise ValueError(f"{type_name}: missing or unknown options {wrong} in the layer's config")
    return layer_type(**options, device=device, dtype=dtype)


def check_linear(linear: nn.Linear, type_name: str) -> Tensor:
    """The weight of a layer about to be quantized, if it can be."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{type_name}: expected an nn.Linear, not {type(linear).__name__}")
    weight = linear.weight.detach()
    if weight.dtype not in FLOATING:
        raise TypeError(
            f"{type_name}: the weight must be float32, float16 or bfloat16, not {weight.dtype}"
        )
    return weight


def finite_weight(linear: nn.Linear, type_name: str) -> Tensor:
    """The weight in fp32; ValueError, naming rows, if it holds NaN or infinities."""
    weight = check_linear(linear, type_name).float()
    finite = weight.isfinite().all(1)
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        listed = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
        raise ValueError(f"{type_name}: the weight holds NaN or infinite values (rows {listed})")
    return weight


def weight_of(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight that a layer multiplies with, whether it is stored compressed or not."""
    if isinstance(layer, CompressedLinear):
        return layer.dequantize(dtype)
    if isinstance(layer, nn.Linear):
        return layer.weight.detach().to(dtype)
    raise TypeError(f"a layer must be an nn.Linear or compressed, not {type(layer).__name__}")


def check_finite_scale(scale: Tensor, weight: Tensor, type_name: str) -> None:
    """Refuse a weight holding NaN or infinities, which show as NaN in its scales."""
    if scale.is_meta or not bool(scale.isnan().any()):
        return
    rows = (~weight.isfinite()).any(1).nonzero().flatten().tolist()
    listed = ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")
    raise ValueError(f"{type_name}: the weight holds NaN or infinite values (rows {listed})")
