"""The int4 linear beside its peers: ``python -m bench int4``. Groups of 128.

Floor of a case: x, the packed weight, its scales and y moved once over the memory bandwidth, or
2·M·N·K operations at the 16-bit peak, whichever is longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from bench.cases import BASELINE, Bench, Linear, Peer, UnavailableError
from bench.ggml import ggml_product
from bench.machine import Machine
from bench.timing import Contender, copies_beyond_cache

GROUP = 128


@dataclass
class Inputs:
    """Rotated copies of one case's inputs; q holds the unpacked values, symmetric around 8."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    q: list[torch.Tensor]
    qweights: list[torch.Tensor]
    scales: list[torch.Tensor]

    def packed(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        index %= len(self.qweights)
        return self.qweights[index], self.scales[index]


def make_inputs(case: Linear, machine: Machine, device: torch.device, dtype: torch.dtype) -> Inputs:
    from pumice.ops import int4_pack

    generator = torch.Generator().manual_seed(0)
    copies = copies_beyond_cache(case.n * case.k // 2, machine.cache_bytes)
    groups = -(-case.k // GROUP)
    x = torch.randn(case.m, case.k, generator=generator).to(device, dtype)
    q = [
        torch.randint(0, 16, (case.n, case.k), generator=generator, dtype=torch.uint8).to(device)
        for _ in range(copies)
    ]
    scales = [
        (torch.rand(case.n, groups, generator=generator) * 0.01 + 0.001).to(device, dtype)
        for _ in range(copies)
    ]
    # The 16-bit weight is larger: as many copies as exceed the cache, but not more than memory.
    weights = [
        (torch.randn(case.n, case.k, generator=generator) / case.k**0.5).to(device, dtype)
        for _ in range(max(2, copies // 4))
    ]
    return Inputs(x, weights, q, [int4_pack(values) for values in q], scales)


def torch_linear(inputs: Inputs) -> Contender:
    return lambda i: functional.linear(inputs.x, inputs.weights[i % len(inputs.weights)])


def pumice_exact(inputs: Inputs) -> Contender:
    from pumice.ops import int4_linear

    def call(i: int) -> torch.Tensor:
        qweight, scales = inputs.packed(i)
        return int4_linear(inputs.x, qweight, scales, group_size=GROUP)

    return call


def pumice_dequantized(inputs: Inputs) -> Contender:
    """What int4_linear does for many tokens, at any number: where it crosses "pumice" is what
    kInt4DequantizeFrom should be."""
    from pumice.ops import int4_dequantize

    if inputs.x.device.type == "cpu":
        raise UnavailableError("CUDA only")
    k, dtype = inputs.x.shape[-1], inputs.x.dtype

    def call(i: int) -> torch.Tensor:
        qweight, scales = inputs.packed(i)
        weight = int4_dequantize(qweight, scales, k=k, group_size=GROUP, out_dtype=dtype)
        return functional.linear(inputs.x, weight)

    return call


def pumice_int8_activation(inputs: Inputs) -> Contender:
    """The trade that ggml and onnxruntime's accuracy level 4 make: activations rounded to int8."""
    from pumice.ops import int4_linear

    if inputs.x.device.type != "cpu":
        raise UnavailableError("CPU only")

    def call(i: int) -> torch.Tensor:
        qweight, scales = inputs.packed(i)
        return int4_linear(inputs.x, qweight, scales, group_size=GROUP, int8_activation=True)

    return call


def aten_int4pack(inputs: Inputs) -> Contender:
    """torch's own weight-only int4 product for the CPU."""
    if inputs.x.device.type != "cpu" or inputs.x.shape[-1] % GROUP:
        raise UnavailableError("CPU and K a multiple of the group only")
    packed = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1) for q in inputs.q
    ]
    # [groups, N, 2]: scale and the value that stands for q = 8.
    parameters = [
        torch.stack([s.t(), torch.zeros_like(s.t())], dim=-1).contiguous() for s in inputs.scales
    ]
    return lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(
        inputs.x, packed[i % len(packed)], GROUP, parameters[i % len(packed)]
    )


def onnxruntime_matmul(inputs: Inputs, accuracy_level: int) -> Contender:
    """onnxruntime's MatMulNBits. Level 4 rounds activations to int8, level 0 computes in fp32."""
    if inputs.x.device.type != "cpu" or inputs.x.dtype != torch.float32:
        raise UnavailableError("CPU and float32 only")
    try:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed") from error
    n, k = inputs.q[0].shape
    if k % GROUP:
        raise UnavailableError("K a multiple of the group only")

    def session(q: torch.Tensor, scales: torch.Tensor) -> Any:
        blob = (q[:, 0::2] | (q[:, 1::2] << 4)).reshape(n, k // GROUP, GROUP // 2)
        attributes: dict[str, Any] = {"K": k, "N": n, "bits": 4, "block_size": GROUP}
        node = helper.make_node(
            "MatMulNBits",
            ["x", "b", "s"],
            ["y"],
            domain="com.microsoft",
            accuracy_level=accuracy_level,
            **attributes,
        )
        graph = helper.make_graph(
            [node],
            "int4",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, n])],
            [
                numpy_helper.from_array(blob.numpy(), "b"),
                numpy_helper.from_array(scales.float().flatten().numpy(), "s"),
            ],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        onnx.checker.check_model(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads spin while it runs, but not into the next contender's time.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    sessions = [session(q, s) for q, s in zip(inputs.q, inputs.scales, strict=True)]
    x = {"x": inputs.x.numpy()}
    return lambda i: sessions[i % len(sessions)].run(None, x)[0]


def ggml_mul_mat(inputs: Inputs, kind: str) -> Contender:
    """ggml on its own quantization of the same weights; its activations are int8 as well."""
    # Checked first, as the weights take a while.
    if inputs.x.device.type != "cpu" or inputs.x.dtype != torch.float32:
        raise UnavailableError("CPU and float32 only")
    weights = [
        (q.float() - 8) * scales.float().repeat_interleave(GROUP, 1)[:, : q.shape[1]]
        for q, scales in zip(inputs.q, inputs.scales, strict=True)
    ]
    return ggml_product(inputs.x, weights, kind)


PEERS: dict[str, Peer[Inputs]] = {
    BASELINE: torch_linear,
    "aten int4pack": aten_int4pack,
    "onnxruntime level 0": lambda inputs: onnxruntime_matmul(inputs, 0),
    "onnxruntime level 4": lambda inputs: onnxruntime_matmul(inputs, 4),
    "ggml q4_0": lambda inputs: ggml_mul_mat(inputs, "q4_0"),
    "ggml q4_K": lambda inputs: ggml_mul_mat(inputs, "q4_K"),
    "pumice": pumice_exact,
    "pumice dequantized": pumice_dequantized,
    "pumice int8 activations": pumice_int8_activation,
}


def floor_us(case: Linear, machine: Machine, dtype: torch.dtype) -> float:
    weight = case.n * case.k // 2 + case.n * -(-case.k // GROUP) * dtype.itemsize
    moved = weight + (case.m * case.k + case.m * case.n) * dtype.itemsize
    return machine.floor_us(moved, case.operations, int8=False)


BENCH = Bench("int4", make_inputs, PEERS, floor_us, ("int4",))
