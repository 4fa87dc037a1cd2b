"""W8A8 as a layer: int8 weights, int8 activations, nothing kept in 16 bit."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pumice.nn._linear import CompressedLinear, check_finite_scale, check_linear
from pumice.ops import int8_linear, int8_quantize

Activations = Literal["per_token", "per_tensor"]
Weights = Literal["per_channel", "per_tensor"]


def check_granularity(name: str, activations: str, weights: str) -> None:
    """ValueError unless both are among the values that the types above name."""
    for argument, value, accepted in (
        ("activations", activations, get_args(Activations)),
        ("weights", weights, get_args(Weights)),
    ):
        if value not in accepted:
            raise ValueError(f"{name}: {argument} must be one of {accepted}, not {value!r}")


class Int8Linear(CompressedLinear):
    """A linear layer with int8 weights and int8 activations (W8A8).

    ::

        x' = x · smooth        q, s = int8_quantize(x')
        y  = (Σ_k q · qweight) · s · weight_scale + bias

    The scale of the activations is found while the layer runs, for each token or for the whole
    input, or is fixed beforehand (``static_activations``). The output has the dtype of the input.
    Inference only: backward raises; to train around frozen weights use :class:`Int8MixedLinear`.

    State dict: ``qweight`` int8 [out_features, in_features]; ``weight_scale`` fp32 [out_features]
    or [1]; ``activation_scale`` fp32 [1] where static; ``smooth`` fp32 [in_features] where
    smoothed; ``bias``.

    Source: vector-wise and tensor-wise quantization as compared by Dettmers et al., "LLM.int8()",
    2022; smoothing: Xiao et al., "SmoothQuant", 2022; token-wise: Yao et al., "ZeroQuant", 2022.

    Args:
        in_features, out_features: K and N.
        bias: whether the layer has a bias.
        activations: "per_token" (a scale for each row) or "per_tensor".
        weights: "per_channel" (a scale for each output) or "per_tensor".
        static_activations: a fixed activation scale; needs activations="per_tensor".
        smoothed: whether activations are multiplied by a vector first.
        device: of all tensors.
        dtype: of the bias.
    """

    options = ("activations", "weights", "static_activations", "smoothed")

    qweight: Tensor
    weight_scale: Tensor
    activation_scale: Tensor | None
    smooth: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activations: Activations = "per_token",
        weights: Weights = "per_channel",
        static_activations: bool = False,
        smoothed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        check_granularity("Int8Linear", activations, weights)
        if static_activations and activations != "per_tensor":
            raise ValueError(
                "Int8Linear: a static activation scale is one for the tensor; "
                "pass activations='per_tensor'"
            )
        self.activations = activations
        self.weights = weights
        self.static_activations = bool(static_activations)
        self.smoothed = bool(smoothed)

        def vector(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float32, device=device)

        qweight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("qweight", qweight)
        self.register_buffer("weight_scale", vector(1 if weights == "per_tensor" else out_features))
        self.register_buffer("activation_scale", vector(1) if static_activations else None)
        self.register_buffer("smooth", vector(in_features) if smoothed else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        activations: Activations = "per_token",
        weights: Weights = "per_channel",
        activation_scale: Tensor | float | None = None,
        smooth: Tensor | None = None,
    ) -> Int8Linear:
        """Quantize a linear layer, which is left as it is.

        Args:
            linear: with a weight in fp32, fp16 or bf16.
            activations, weights: see :class:`Int8Linear`.
            activation_scale: positive static scale of the activations (after smoothing).
            smooth: fp32 [in_features], positive; multiplies the activations while the layer runs,
                so the weight is divided by it here.

        Raises:
            TypeError: not an nn.Linear, or a weight that is not fp32, fp16 or bf16.
            ValueError: a weight holding NaN or infinities; a wrong scale or smoothing vector.
        """
        name = cls.__name__
        weight = check_linear(linear, name)
        layer = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            activations=activations,
            weights=weights,
            static_activations=activation_scale is not None,
            smoothed=smooth is not None,
            device="meta",
            dtype=weight.dtype,
        )
        if activation_scale is not None:
            layer.activation_scale = _positive(
                name, "activation_scale", activation_scale, 1, weight.device
            )
        if smooth is not None:
            layer.smooth = _positive(name, "smooth", smooth, linear.in_features, weight.device)
        layer.qweight, scale, _ = int8_quantize(
            weight,
            per_tensor=weights == "per_tensor",
            smooth=None if layer.smooth is None else layer.smooth.reciprocal(),
        )
        check_finite_scale(scale, weight, name)
        layer.weight_scale = scale
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), linear.bias.requires_grad)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        q, scale, _ = int8_quantize(
            x,
            per_tensor=self.activations == "per_tensor",
            smooth=self.smooth,
            scale=self.activation_scale,
        )
        return int8_linear(q, scale, self.qweight, self.weight_scale, self.bias, out_dtype=x.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """qweight · weight_scale · smooth, of shape [out_features, in_features], through fp32."""
        weight = self.qweight * self.weight_scale.unsqueeze(1)
        if self.smooth is not None:
            weight = weight * self.smooth
        return weight.to(dtype)


def _positive(
    layer: str, name: str, values: Tensor | float, size: int, device: torch.device
) -> Tensor:
    vector = torch.as_tensor(values, dtype=torch.float32, device=device).detach().clone()
    if vector.numel() != size or vector.dim() > 1:
        raise ValueError(f"{layer}: {name} must hold {size} numbers, not {list(vector.shape)}")
    if not vector.is_meta and not bool(((vector > 0) & vector.isfinite()).all()):
        raise ValueError(f"{layer}: {name} must be positive and finite everywhere")
    return vector.reshape(size)
