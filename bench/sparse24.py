"""The 2:4 linears beside their dense counterparts: ``python -m bench sparse24``.

Each kind of weight beside the dense one of the same kind: floating beside torch's product (and, on
CUDA, its semi-structured one), int8 beside ``int8_linear`` (activations quantized before, in both),
int4 in groups of 128 beside ``int4_linear``.

Floor of a contender: x, the weight (the kept values at their width, an eighth of a byte of places
for each column, scales) and y moved once over the memory bandwidth, or M·N·K operations, half of
the dense product's, at the peak of the dtype, whichever is longer; of torch's and the dense
kernels, the floor of the 2:4 weight in the dtype of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from bench.cases import BASELINE, Bench, Linear, Peer, UnavailableError
from bench.machine import Machine
from bench.timing import Contender, copies_beyond_cache

GROUP = 128


@dataclass
class Inputs:
    """Rotated copies of one case's inputs. `weights` are 2:4, written out."""

    x: torch.Tensor
    q: torch.Tensor
    scale: torch.Tensor
    weight_scale: torch.Tensor
    weights: list[torch.Tensor]

    def codes(self, index: int) -> torch.Tensor:
        """4-bit values of a weight, dense, 8 where nothing is kept."""
        return (self.weights[index].float() * 8).round().clamp(-8, 7).add(8).to(torch.uint8)

    def scales(self) -> torch.Tensor:
        n, k = self.weights[0].shape
        return torch.full((n, -(-k // GROUP)), 1 / 8, device=self.x.device, dtype=self.x.dtype)


def make_inputs(case: Linear, machine: Machine, device: torch.device, dtype: torch.dtype) -> Inputs:
    from pumice.ops import int8_quantize

    if case.k % 4:
        raise ValueError(f"{case}: K must be a multiple of 4")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.m, case.k, generator=generator).to(device, dtype)
    q, scale, _ = int8_quantize(x)
    # The smallest of the weights, packed int4, still exceeds the cache.
    copies = copies_beyond_cache(case.n * case.k * 3 // 8, machine.cache_bytes)
    weights = []
    for _ in range(copies):
        w = torch.randn(case.n, case.k // 4, 4, generator=generator) / 4
        w.scatter_(-1, w.abs().argsort(-1)[..., :2], 0.0)
        weights.append(w.view(case.n, case.k).to(device, dtype))
    return Inputs(x, q, scale, torch.ones(case.n, device=device) / 127, weights)


def torch_linear(inputs: Inputs) -> Contender:
    return lambda i: functional.linear(inputs.x, inputs.weights[i % len(inputs.weights)])


def torch_semi_structured(inputs: Inputs) -> Contender:
    if inputs.x.device.type == "cpu":
        raise UnavailableError("CUDA only")
    weights = [torch.sparse.to_sparse_semi_structured(w) for w in inputs.weights]
    return lambda i: functional.linear(inputs.x, weights[i % len(weights)])


def pumice_float(inputs: Inputs) -> Contender:
    from pumice.ops import sparse24_compress, sparse24_linear

    weights = [sparse24_compress(w) for w in inputs.weights]
    return lambda i: sparse24_linear(inputs.x, *weights[i % len(weights)])


def int8_weights(inputs: Inputs) -> list[torch.Tensor]:
    return [(w.float() * 127).round().clamp(-127, 127).to(torch.int8) for w in inputs.weights]


def pumice_int8_dense(inputs: Inputs) -> Contender:
    from pumice.ops import int8_linear

    weights = int8_weights(inputs)
    return lambda i: int8_linear(
        inputs.q,
        inputs.scale,
        weights[i % len(weights)],
        inputs.weight_scale,
        out_dtype=inputs.x.dtype,
    )


def pumice_int8(inputs: Inputs) -> Contender:
    from pumice.ops import sparse24_compress, sparse24_int8_linear

    weights = [sparse24_compress(w) for w in int8_weights(inputs)]
    return lambda i: sparse24_int8_linear(
        inputs.q,
        inputs.scale,
        *weights[i % len(weights)],
        inputs.weight_scale,
        out_dtype=inputs.x.dtype,
    )


def pumice_int4_dense(inputs: Inputs) -> Contender:
    from pumice.ops import int4_linear, int4_pack

    weights = [int4_pack(inputs.codes(i)) for i in range(len(inputs.weights))]
    scales = inputs.scales()
    return lambda i: int4_linear(inputs.x, weights[i % len(weights)], scales, group_size=GROUP)


def pumice_int4(inputs: Inputs) -> Contender:
    from pumice.ops import int4_pack, sparse24_compress, sparse24_gather, sparse24_int4_linear

    weights = []
    for i, w in enumerate(inputs.weights):
        meta = sparse24_compress(w)[1]
        kept = sparse24_gather(inputs.codes(i).view(torch.int8), meta).view(torch.uint8)
        weights.append((int4_pack(kept), meta))
    scales = inputs.scales()
    return lambda i: sparse24_int4_linear(
        inputs.x, *weights[i % len(weights)], scales, group_size=GROUP
    )


PEERS: dict[str, Peer[Inputs]] = {
    BASELINE: torch_linear,
    "torch 2:4": torch_semi_structured,
    "pumice": pumice_float,
    "pumice int8 dense": pumice_int8_dense,
    "pumice int8": pumice_int8,
    "pumice int4 dense": pumice_int4_dense,
    "pumice int4": pumice_int4,
}


def _floor_us(
    case: Linear, machine: Machine, dtype: torch.dtype, weight_bytes: int, x_bytes: int
) -> float:
    moved = weight_bytes + case.n * case.k // 8
    moved += case.m * case.k * x_bytes + case.m * case.n * dtype.itemsize
    return machine.floor_us(moved, case.operations // 2, int8=x_bytes == 1)


def floor_us(case: Linear, machine: Machine, dtype: torch.dtype) -> float:
    return _floor_us(case, machine, dtype, case.n * case.k * dtype.itemsize // 2, dtype.itemsize)


def int8_floor_us(case: Linear, machine: Machine, dtype: torch.dtype) -> float:
    return _floor_us(case, machine, dtype, case.n * case.k // 2 + 4 * case.n, x_bytes=1)


def int4_floor_us(case: Linear, machine: Machine, dtype: torch.dtype) -> float:
    scales = case.n * -(-case.k // GROUP) * dtype.itemsize
    return _floor_us(case, machine, dtype, case.n * case.k // 4 + scales, dtype.itemsize)


BENCH = Bench(
    "sparse24",
    make_inputs,
    PEERS,
    floor_us,
    ("sparse24",),
    floors={"pumice int8": int8_floor_us, "pumice int4": int4_floor_us},
)
