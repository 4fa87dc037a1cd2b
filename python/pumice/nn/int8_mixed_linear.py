"""LLM.int8() as a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pumice.nn._bitsandbytes import convert_layer
from pumice.nn._linear import CompressedLinear, check_finite_scale, check_linear
from pumice.ops import int8_mixed_linear, int8_quantize
from pumice.ops._checks import check_threshold


class Int8MixedLinear(CompressedLinear):
    """A linear layer with int8 weights and 16-bit outlier columns (LLM.int8()).

    Weights are quantized row by row by their absolute maximum, activations token by token while the
    layer runs; columns of the activations holding |x| ≥ ``threshold`` are multiplied in 16 bit. See
    :func:`pumice.ops.int8_mixed_linear` for the formula, and for whether a row of the result
    depends on its neighbours (``per_element``). The output has the dtype of the input. Gradients
    flow to the input and the bias, so adapters can be trained around the frozen weights.

    State dict: ``qweight`` int8 [out_features, in_features], ``weight_scale`` fp32 [out_features],
    ``bias``. That of bitsandbytes' Linear8bitLt (``weight`` int8, ``SCB`` fp32) loads too.

    Source: Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for
    Transformers at Scale", 2022.

    Args:
        in_features, out_features: K and N.
        bias: whether the layer has a bias.
        threshold: in the units of the activations; positive, ``math.inf`` for no decomposition.
        per_element: only outlying elements in 16 bit, not their columns: rows are independent.
        device: of all tensors.
        dtype: of the bias; the compressed tensors have dtypes of their own.
    """

    options = ("threshold", "per_element")

    qweight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold: float = 6.0,
        per_element: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        check_threshold("Int8MixedLinear", threshold)
        self.threshold = float(threshold)
        self.per_element = bool(per_element)
        qweight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("qweight", qweight)
        weight_scale = torch.zeros(out_features, dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", weight_scale)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, threshold: float = 6.0, per_element: bool = False
    ) -> Int8MixedLinear:
        """Quantize a linear layer, which is left as it is.

        Raises:
            TypeError: not an nn.Linear, or a weight that is not fp32, fp16 or bf16.
            ValueError: a weight holding NaN or infinities; a threshold that is not positive.
        """
        weight = check_linear(linear, cls.__name__)
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            threshold=threshold,
            per_element=per_element,
            device="meta",
            dtype=weight.dtype,
        )
        layer.qweight, layer.weight_scale, _ = int8_quantize(weight)
        check_finite_scale(layer.weight_scale, weight, cls.__name__)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return int8_mixed_linear(
            x,
            self.qweight,
            self.weight_scale,
            self.bias,
            threshold=self.threshold,
            per_element=self.per_element,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """qweight · weight_scale, of shape [out_features, in_features], through fp32."""
        return (self.qweight * self.weight_scale.unsqueeze(1)).to(dtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        convert_layer(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
