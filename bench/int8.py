"""The int8 linears beside their peers: ``python -m bench int8``.

Floor of a case: x, the int8 weight and y moved once over the memory bandwidth, or 2·M·N·K
operations at the int8 peak, whichever is longer.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from bench.cases import BASELINE, Bench, Linear, Peer, UnavailableError
from bench.machine import Machine
from bench.timing import Contender, copies_beyond_cache

OUTLIER_FRACTION = 0.005  # of the columns, as in LLM.int8()'s models
OUTLIER_VALUE = 20.0


@dataclass
class Inputs:
    """Rotated copies of one case's inputs; `outliers` is x with 0.5 % outlying columns."""

    x: torch.Tensor
    outliers: torch.Tensor
    weights: list[torch.Tensor]
    qweights: list[torch.Tensor]
    scales: list[torch.Tensor]

    def weight(self, index: int) -> torch.Tensor:
        return self.weights[index % len(self.weights)]

    def quantized(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        index %= len(self.qweights)
        return self.qweights[index], self.scales[index]


def make_inputs(case: Linear, machine: Machine, device: torch.device, dtype: torch.dtype) -> Inputs:
    from pumice.ops import int8_quantize

    generator = torch.Generator().manual_seed(0)
    copies = copies_beyond_cache(case.n * case.k, machine.cache_bytes)
    x = torch.randn(case.m, case.k, generator=generator).clamp_(-5.0, 5.0).to(device, dtype)
    outliers = x.clone()
    columns = torch.randperm(case.k, generator=generator)[: round(case.k * OUTLIER_FRACTION)]
    outliers[:, columns.to(device)] = OUTLIER_VALUE
    weights = [
        (torch.randn(case.n, case.k, generator=generator) / case.k**0.5).to(device, dtype)
        for _ in range(copies)
    ]
    quantized = [int8_quantize(weight) for weight in weights]
    return Inputs(x, outliers, weights, [q for q, _, _ in quantized], [s for _, s, _ in quantized])


def torch_linear(inputs: Inputs) -> Contender:
    return lambda i: functional.linear(inputs.x, inputs.weight(i))


def pumice_w8a8(inputs: Inputs) -> Contender:
    from pumice.ops import int8_linear, int8_quantize

    def call(i: int) -> torch.Tensor:
        q, scale, _ = int8_quantize(inputs.x)
        return int8_linear(q, scale, *inputs.quantized(i), out_dtype=inputs.x.dtype)

    return call


def pumice_mixed(inputs: Inputs) -> Contender:
    from pumice.ops import int8_mixed_linear

    return lambda i: int8_mixed_linear(inputs.x, *inputs.quantized(i), threshold=6.0)


def pumice_mixed_outliers(inputs: Inputs) -> Contender:
    from pumice.ops import int8_mixed_linear

    return lambda i: int8_mixed_linear(inputs.outliers, *inputs.quantized(i), threshold=6.0)


def fbgemm_dynamic(inputs: Inputs) -> Contender:
    """torch's dynamically quantized linear: per-tensor activations, per-channel weights, fp32."""
    if inputs.x.device.type != "cpu" or inputs.x.dtype != torch.float32:
        raise UnavailableError("CPU and float32 only")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise UnavailableError("this torch has no fbgemm")
    torch.backends.quantized.engine = "fbgemm"
    packed: list[Any] = []
    warnings.filterwarnings("ignore", message=".*quantized tensor creation.*")
    for q, scale in zip(inputs.qweights, inputs.scales, strict=True):
        zeros = torch.zeros(len(scale), dtype=torch.long)
        per_channel = torch._make_per_channel_quantized_tensor(q, scale.double(), zeros, 0)
        packed.append(torch.ops.quantized.linear_prepack(per_channel, None))
    return lambda i: torch.ops.quantized.linear_dynamic(
        inputs.x, packed[i % len(packed)], reduce_range=False
    )


def aten_int8pack(inputs: Inputs) -> Contender:
    """Weight-only int8 with 16-bit activations, torch's `_weight_int8pack_mm`."""
    if inputs.x.dtype != torch.bfloat16:
        raise UnavailableError("bfloat16 only")
    scales = [scale.to(torch.bfloat16) for scale in inputs.scales]
    call: Contender = lambda i: torch._weight_int8pack_mm(  # noqa: E731
        inputs.x, inputs.quantized(i)[0], scales[i % len(scales)]
    )
    try:
        call(0)
    except (RuntimeError, NotImplementedError) as error:
        raise UnavailableError(str(error).splitlines()[0]) from error
    return call


def torch_int_mm(inputs: Inputs) -> Contender:
    """torch._int_mm (cuBLASLt) with dequantization in plain torch, activations quantized by us."""
    if inputs.x.device.type != "cuda" or inputs.x.shape[0] <= 16:
        raise UnavailableError("CUDA and M > 16 only")
    from pumice.ops import int8_quantize

    def call(i: int) -> torch.Tensor:
        q, scale, _ = int8_quantize(inputs.x)
        qweight, weight_scale = inputs.quantized(i)
        product = torch._int_mm(q, qweight.t())
        return (product * scale[:, None] * weight_scale).to(inputs.x.dtype)

    return call


def bitsandbytes_int8(inputs: Inputs) -> Contender:
    """bitsandbytes' LLM.int8() matmul, on the inputs with outliers."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UnavailableError("not installed") from error
    layers = []
    for weight in inputs.weights:
        n, k = weight.shape
        layer = bitsandbytes.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6)
        layer.load_state_dict({"weight": weight.to("cpu")})
        layers.append(layer.to(weight.device).to(weight.dtype))
    return lambda i: layers[i % len(layers)](inputs.outliers)


PEERS: dict[str, Peer[Inputs]] = {
    BASELINE: torch_linear,
    "fbgemm dynamic": fbgemm_dynamic,
    "aten int8pack": aten_int8pack,
    "torch _int_mm": torch_int_mm,
    "bitsandbytes": bitsandbytes_int8,
    "pumice W8A8": pumice_w8a8,
    "pumice mixed": pumice_mixed,
    "pumice mixed, 0.5 % outliers": pumice_mixed_outliers,
}


def floor_us(case: Linear, machine: Machine, dtype: torch.dtype) -> float:
    moved = case.n * case.k + (case.m * case.k + case.m * case.n) * dtype.itemsize
    return machine.floor_us(moved, case.operations, int8=True)


BENCH = Bench("int8", make_inputs, PEERS, floor_us, ("int8",))
