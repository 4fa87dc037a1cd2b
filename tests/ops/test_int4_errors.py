"""What the int4 operators refuse, and how they say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pumice
from backends import Backend

Q = torch.ones(3, 40, dtype=torch.uint8)
W = pumice.ops.int4_pack(Q)
X = torch.ones(2, 40)
S = torch.ones(3, 3)
Z = torch.full((3, 3), 8, dtype=torch.uint8)
IDX = torch.arange(40, dtype=torch.int32)

ERRORS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "x must be a torch.Tensor, not float", {"x": 1.0}),
    (TypeError, "x must be float32 or float16 or bfloat16, not int32", {"x": X.int()}),
    (ValueError, "x must have shape .*, but it is a scalar", {"x": torch.tensor(1.0)}),
    (ValueError, "last dimension of x is empty", {"x": X[:, :0]}),
    (TypeError, "qweight must be int32, not int8", {"qweight": W.to(torch.int8)}),
    (ValueError, r"qweight must have shape \[N, 5\] for K = 40 values of 4 bits, .* not \[3, 4\]",
     {"qweight": W[:, :4].contiguous()}),
    (ValueError, r"qweight must have shape \[N, 4\] for K = 40 values of 3 bits", {"bits": 3}),
    (ValueError, "qweight must have shape", {"qweight": W[0]}),
    (ValueError, "qweight must have shape", {"qweight": W[:0]}),
    (ValueError, "qweight must be contiguous", {"qweight": W.T.contiguous().T}),
    (ValueError, "bits must be 2, 3, 4 or 8, not 5", {"bits": 5}),
    (ValueError, "bits must be 2, 3, 4 or 8, not True", {"bits": True}),
    (ValueError, "bits must be 2, 3, 4 or 8, not '4'", {"bits": "4"}),
    (ValueError, "group_size must be -1 .* positive multiple of 16, not 0", {"group_size": 0}),
    (ValueError, "group_size must be -1 .*, not 24", {"group_size": 24}),
    (ValueError, "group_size must be -1 .*, not -16", {"group_size": -16}),
    (TypeError, "group_size must be an int, not float", {"group_size": 16.0}),
    (TypeError, "scales must be float32 or float16 or bfloat16, not float64",
     {"scales": S.double()}),
    (ValueError, r"scales must have shape \[3, 3\] for K = 40 in groups of 16, not \[3, 2\]",
     {"scales": S[:, :2]}),
    (ValueError, r"scales must have shape \[3, 1\] .* groups of -1", {"group_size": -1}),
    (ValueError, "scales requires a gradient", {"scales": S.clone().requires_grad_()}),
    (TypeError, "zeros must be uint8 or float32, not float16", {"zeros": S.half()}),
    (TypeError, "zeros must be uint8 or float32, not int32", {"zeros": Z.int()}),
    (ValueError, r"zeros must have the shape of scales \[3, 3\], not \[3, 1\]",
     {"zeros": Z[:, :1]}),
    (TypeError, "g_idx must be int32, not int64", {"g_idx": IDX.long()}),
    (ValueError, r"g_idx must have shape \[40\], not \[39\]", {"g_idx": IDX[1:]}),
    (ValueError, r"scales must have shape \[3, G\]", {"g_idx": IDX, "scales": S[:2]}),
    (TypeError, "perm must be int32", {"perm": IDX.long()}),
    (ValueError, r"perm must have shape \[40\]", {"perm": IDX[:3]}),
    (ValueError, r"bias must have shape \[3\], not \[2\]", {"bias": torch.ones(2)}),
    (ValueError, "outlier_idx and outlier_weight belong together", {"outlier_idx": IDX[:2]}),
    (ValueError, "outlier_idx and outlier_weight belong together",
     {"outlier_weight": torch.ones(3, 2)}),
    (ValueError, r"outlier_weight must have shape \[3, 2\], not \[2, 2\]",
     {"outlier_idx": IDX[:2], "outlier_weight": torch.ones(2, 2)}),
    (ValueError, r"outlier_idx must have shape \[2\]",
     {"outlier_idx": IDX[:3], "outlier_weight": torch.ones(3, 2)}),
    (ValueError, "outlier_weight must be a matrix",
     {"outlier_idx": IDX[:3], "outlier_weight": torch.ones(3)}),
    (ValueError, "lora_a and lora_b belong together", {"lora_a": torch.ones(2, 40)}),
    (ValueError, r"lora_a must have shape \[2, 40\], not \[2, 39\]",
     {"lora_a": torch.ones(2, 39), "lora_b": torch.ones(3, 2)}),
    (ValueError, r"lora_b must have shape \[3, 2\], not \[3, 1\]",
     {"lora_a": torch.ones(2, 40), "lora_b": torch.ones(3, 1)}),
    (TypeError, "lora_b must be float32", {"lora_a": torch.ones(2, 40), "lora_b": W}),
    (ValueError, "qweight is on meta, but x is on cpu", {"qweight": W.to("meta")}),
    (ValueError, "scales is on meta, but qweight is on cpu", {"scales": S.to("meta")}),
    (ValueError, "zeros is on meta", {"zeros": Z.to("meta")}),
    (ValueError, "perm is on meta", {"perm": IDX.to("meta")}),
    (ValueError, "bias is on meta", {"bias": torch.ones(3, device="meta")}),
]  # fmt: skip


def call(replaced: dict[str, Any]) -> Tensor:
    arguments = {"x": X, "qweight": W, "scales": S, "group_size": 16}
    return pumice.ops.int4_linear(**{**arguments, **replaced})


@pytest.mark.parametrize(("error", "message", "replaced"), ERRORS)
def test_bad_input(error: type[Exception], message: str, replaced: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"int4_linear: .*{message}"):
        call(replaced)


@pytest.mark.parametrize(
    ("message", "replaced"),
    [
        ("zeros must be below 2\\^bits = 16, but hold 16", {"zeros": Z * 2}),
        ("g_idx must lie in \\[0, 3\\), but holds 3", {"g_idx": IDX % 4}),
        ("g_idx must lie in \\[0, 3\\), but holds -1", {"g_idx": IDX % 3 - 1}),
        ("perm must lie in \\[0, 40\\), but holds 40", {"perm": IDX + 1}),
        ("outlier_idx must lie in \\[0, 40\\), but holds -3",
         {"outlier_idx": IDX[:2] - 3, "outlier_weight": torch.ones(3, 2)}),
    ],
)  # fmt: skip
def test_bad_values_on_the_cpu(message: str, replaced: dict[str, Any]) -> None:
    """Values are looked at on the CPU, where it costs nothing beside the product."""
    with pytest.raises(RuntimeError, match=f"int4_linear: {message}"):
        call(replaced)


def test_int8_activation_elsewhere() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a device other than the CPU")
    with pytest.raises(RuntimeError, match="int8_activation=True has kernels on the CPU only"):
        pumice.ops.int4_linear(X.cuda(), W.cuda(), S.cuda(), group_size=16, int8_activation=True)


@pytest.mark.parametrize(
    ("error", "message", "function"),
    [
        (TypeError, "int4_pack: q must be uint8, not int32", lambda: pumice.ops.int4_pack(Q.int())),
        (ValueError, "int4_pack: q must have shape", lambda: pumice.ops.int4_pack(Q[0])),
        (ValueError, "int4_pack: bits must be", lambda: pumice.ops.int4_pack(Q, 1)),
        (ValueError, "int4_unpack: k must be at least 1", lambda: pumice.ops.int4_unpack(W, 0)),
        (ValueError, r"int4_unpack: qweight must have shape \[N, 6\]",
         lambda: pumice.ops.int4_unpack(W, 41)),
        (TypeError, "int4_dequantize: out_dtype must be .*, not torch.float64",
         lambda: pumice.ops.int4_dequantize(W, S, k=40, group_size=16, out_dtype=torch.float64)),
        (RuntimeError, "int4_dequantize: zeros must be below 2\\^bits = 16",
         lambda: pumice.ops.int4_dequantize(
             W, S, Z * 3, k=40, group_size=16, out_dtype=torch.float32)),
    ],
)  # fmt: skip
def test_bad_weight(error: type[Exception], message: str, function: Any) -> None:
    with pytest.raises(error, match=message):
        function()


def test_weights_are_not_differentiable() -> None:
    scales = S.clone().requires_grad_()
    with pytest.raises(ValueError, match="scales requires a gradient"):
        pumice.ops.int4_dequantize(W, scales, k=40, group_size=16, out_dtype=torch.float32)


@pytest.mark.parametrize(
    ("message", "replaced"),
    [
        ("x must be float32", {"x": X.int()}),
        ("qweight must be int32", {"qweight": W.to(torch.int8)}),
        ("qweight must be a matrix", {"qweight": W[:, :4].contiguous()}),
        ("qweight must be contiguous", {"qweight": W.T.contiguous().T}),
        ("bits must be 2, 3, 4 or 8, not 7", {"bits": 7}),
        ("group_size must be -1 or a positive multiple of 16, not 8", {"group_size": 8}),
        ("scales must be a matrix of 3 x 3", {"scales": S[:, :2]}),
        ("zeros must be uint8 or of the dtype of scales", {"zeros": S.half()}),
        ("perm must be int32", {"perm": IDX.long()}),
        ("perm must be a vector of 40", {"perm": IDX[:4]}),
        ("outlier_idx and outlier_weight belong together", {"outlier_idx": IDX[:2]}),
        ("lora_a and lora_b belong together", {"lora_b": torch.ones(3, 2)}),
        ("lora_b must be a matrix of 3 x 2",
         {"lora_a": torch.ones(2, 40), "lora_b": torch.ones(3, 1)}),
        ("bias must be a vector of 3", {"bias": torch.ones(2)}),
    ],
)  # fmt: skip
def test_second_wall(backend: Backend, message: str, replaced: dict[str, Any]) -> None:
    """Callers of torch.ops, past the Python checks."""
    names = ("x", "qweight", "scales", "zeros", "g_idx", "perm", "bias", "outlier_idx",
             "outlier_weight", "lora_a", "lora_b")  # fmt: skip
    arguments: dict[str, Any] = dict.fromkeys(names)
    arguments |= {"x": X, "qweight": W, "scales": S, "group_size": 16} | replaced
    moved = {}
    for name, value in arguments.items():
        moved[name] = value
        if isinstance(value, Tensor):  # .to would make it contiguous
            moved[name] = value if backend.device == "cpu" else value.to(backend.device)
    with pytest.raises(RuntimeError, match=f"int4_linear: .*{message}"):
        backend.ops.int4_linear(**moved)
