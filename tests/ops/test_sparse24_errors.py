"""What the 2:4 operators refuse, and how they say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pumice
from backends import Backend

W = torch.tensor([1.0, 0.0, 0.0, -2.0]).repeat(3, 10)
V, M = pumice.ops.sparse24_compress(W)
V8, _ = pumice.ops.sparse24_compress(W.to(torch.int8))
X = torch.ones(2, 40)
Q = torch.ones(2, 40, dtype=torch.int8)
P = pumice.ops.int4_pack(torch.ones(3, 20, dtype=torch.uint8))
S = torch.ones(3, 2)
Z = torch.full((3, 2), 8, dtype=torch.uint8)

Errors = list[tuple[type[Exception], str, dict[str, Any]]]

COMPRESS: Errors = [
    (TypeError, "w must be a torch.Tensor, not list", {"w": [1.0]}),
    (TypeError, "w must be float32 or float16 or bfloat16 or int8, not float64",
     {"w": W.double()}),
    (ValueError, r"w must have shape \[N, K\] with N, K >= 1, not \[40\]", {"w": W[0]}),
    (ValueError, r"not \[0, 40\]", {"w": W[:0]}),
    (ValueError, "K a multiple of 4 columns, whole groups of four, not K = 38", {"w": W[:, :38]}),
]  # fmt: skip

LINEAR: Errors = [
    (TypeError, "x must be a torch.Tensor, not float", {"x": 1.0}),
    (TypeError, "x must be float32 or float16 or bfloat16, not int8", {"x": Q}),
    (ValueError, "it is a scalar", {"x": torch.tensor(1.0)}),
    (TypeError, "values must be float32, not float16", {"values": V.half()}),
    (TypeError, "values must be float16, not float32", {"x": X.half()}),
    (ValueError, r"values must have shape \[N, K/2\].* not \[3, 19\]", {"values": V[:, :19]}),
    (ValueError, r"values must have shape \[N, K/2\].* not \[0, 20\]", {"values": V[:0]}),
    (ValueError, r"values must have shape \[N, K/2\].* not \[20\]", {"values": V[0]}),
    (ValueError, "values must be contiguous", {"values": V.T.contiguous().T}),
    (TypeError, "meta must be uint8, not int16", {"meta": M.short()}),
    (ValueError, r"meta must have shape \[3, 8\] for 3 rows of K = 40 columns, not \[3, 4\]",
     {"meta": M[:, :4]}),
    (ValueError, r"meta must have shape \[3, 8\]", {"meta": M[:2]}),
    (ValueError, "last dimension of x must be K = 40, twice the columns of values",
     {"x": X[:, :36]}),
    (ValueError, r"bias must have shape \[3\], not \[2\]", {"bias": torch.ones(2)}),
    (TypeError, "bias must be float32", {"bias": torch.ones(3).double()}),
]  # fmt: skip

INT8: Errors = [
    (TypeError, "q must be int8, not float32", {"q": X}),
    (TypeError, "values must be int8, not float32", {"values": V}),
    (TypeError, "out_dtype must be float32, .* not torch.int32", {"out_dtype": torch.int32}),
    (TypeError, "scale must be float32", {"scale": torch.ones(2).half()}),
    (ValueError, "scale must hold one element or one for each row", {"scale": torch.ones(3)}),
    (ValueError, r"weight_scale must have shape \[3\] or \[1\], not \[2\]",
     {"weight_scale": torch.ones(2)}),
    (ValueError, "weight_scale requires a gradient",
     {"weight_scale": torch.ones(3, requires_grad=True)}),
    (ValueError, "last dimension of q must be K = 40", {"q": Q[:, :8]}),
    (ValueError, "K = 131072 input features; beyond 131071",
     {"q": torch.ones(1, 131072, dtype=torch.int8),
      "values": torch.ones(3, 65536, dtype=torch.int8),
      "meta": torch.full((3, 16384), 0x44, dtype=torch.uint8)}),
]  # fmt: skip

INT4: Errors = [
    (TypeError, "x must be float32", {"x": Q}),
    (ValueError, "the last dimension of x, must be a multiple of 4, not 38", {"x": X[:, :38]}),
    (TypeError, "qvalues must be int32, not uint8", {"qvalues": P.to(torch.uint8)}),
    (ValueError, r"qvalues must have shape \[N, 3\] for 20 kept values of 4 bits, half of K = 40",
     {"qvalues": P[:, :2].contiguous()}),
    (ValueError, r"qvalues must have shape \[N, 2\] for 20 kept values of 3 bits", {"bits": 3}),
    (ValueError, "qvalues must be contiguous", {"qvalues": P.T.contiguous().T}),
    (ValueError, "bits must be 2, 3, 4 or 8, not 5", {"bits": 5}),
    (TypeError, "group_size must be an int, not float", {"group_size": 32.0}),
    (ValueError, "group_size must be -1 .* positive multiple of 32 columns, not 16",
     {"group_size": 16}),
    (ValueError, r"scales must have shape \[3, 2\] for K = 40 in groups of 32, not \[3, 1\]",
     {"scales": S[:, :1]}),
    (TypeError, "scales must be float32 or float16 or bfloat16", {"scales": S.double()}),
    (ValueError, "scales requires a gradient", {"scales": S.clone().requires_grad_()}),
    (TypeError, "zeros must be uint8 or float32, not int32", {"zeros": Z.int()}),
    (ValueError, "zeros must have the shape of scales", {"zeros": Z[:, :1]}),
    (ValueError, r"meta must have shape \[3, 8\]", {"meta": M[:, :4]}),
    (ValueError, r"bias must have shape \[3\]", {"bias": torch.ones(2)}),
]  # fmt: skip

ARGUMENTS: dict[str, tuple[dict[str, Any], Errors]] = {
    "sparse24_compress": ({"w": W}, COMPRESS),
    "sparse24_gather": ({"w": W, "meta": M}, [*COMPRESS, *LINEAR[9:12]]),
    "sparse24_decompress": ({"values": V, "meta": M}, LINEAR[5:8] + LINEAR[9:12]),
    "sparse24_linear": ({"x": X, "values": V, "meta": M}, LINEAR),
    "sparse24_int8_linear": (
        {"q": Q, "scale": torch.ones(2), "values": V8, "meta": M, "weight_scale": torch.ones(3),
         "out_dtype": torch.float16},
        INT8,
    ),
    "sparse24_int4_linear": (
        {"x": X, "qvalues": P, "meta": M, "scales": S, "zeros": Z, "group_size": 32},
        INT4,
    ),
}  # fmt: skip
CASES = [(name, i) for name, (_, errors) in ARGUMENTS.items() for i in range(len(errors))]


@pytest.mark.parametrize(("name", "index"), CASES)
def test_refused(backend: Backend, name: str, index: int) -> None:
    arguments, errors = ARGUMENTS[name]
    error, message, changes = errors[index]

    def place(value: Any) -> Any:
        return value.to(backend.device) if isinstance(value, Tensor) else value

    given = {key: place(value) for key, value in {**arguments, **changes}.items()}
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        getattr(pumice.ops, name)(**given)


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="meta is on meta, but values is on cpu"):
        pumice.ops.sparse24_linear(X, V, M.to("meta"))
    with pytest.raises(ValueError, match="values is on meta, but x is on cpu"):
        pumice.ops.sparse24_linear(X, V.to("meta"), M.to("meta"))
    monkeypatch.setattr(pumice.ops._library, "devices", {"meta"})
    with pytest.raises(RuntimeError, match="sparse24_compress: pumice has no kernels"):
        pumice.ops.sparse24_compress(W)


def test_zero_points_in_range() -> None:
    arguments = {**ARGUMENTS["sparse24_int4_linear"][0], "zeros": Z + 8}
    with pytest.raises(RuntimeError, match=r"zeros must be below 2\^bits = 16, but hold 16"):
        pumice.ops.sparse24_int4_linear(**arguments)


CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("sparse24_compress", (W[:, :38],), {}, "K must be a multiple of 4"),
    ("sparse24_compress", (W.double(),), {}, "must be float32, float16, bfloat16 or int8"),
    ("sparse24_gather", (W, M[:, :4].contiguous()), {}, "meta must be a matrix of 3 x 8"),
    ("sparse24_gather", (W, M.T.contiguous().T), {}, "meta must be contiguous"),
    ("sparse24_decompress", (V[:, :19].contiguous(), M), {}, "an even number of columns"),
    ("sparse24_linear", (X.half(), V, M, None), {}, "values must have the dtype of x"),
    ("sparse24_linear", (X[:, :36], V, M, None), {}, "last dimension of x must be K = 40"),
    ("sparse24_linear", (X, V, M.to(torch.int8), None), {}, "meta must be uint8"),
    ("sparse24_int8_linear", (Q, torch.ones(3), V8, M, torch.ones(3), None),
     {"out_dtype": torch.float16}, "scale must hold 1 or M = 2"),
    ("sparse24_int8_linear", (Q, torch.ones(2), V, M, torch.ones(3), None),
     {"out_dtype": torch.float16}, "values must be int8"),
    ("sparse24_int4_linear", (X, P, M, S, None, None), {"group_size": 16},
     "group_size must be -1 or a positive multiple of 32"),
    ("sparse24_int4_linear", (X[:, :36], P, M, S, None, None), {"group_size": 32},
     "qweight must be a matrix|meta must be a matrix|scales must be a matrix|group"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "keywords", "message"), CALLS)
def test_operators_check_again(
    backend: Backend, name: str, arguments: Any, keywords: Any, message: str
) -> None:
    given = [a.to(backend.device) if isinstance(a, Tensor) else a for a in arguments]
    if name == "sparse24_int4_linear" and "multiple" not in message:
        given[0] = given[0][:, :32]  # one group less
        message = "matrix of"
    with pytest.raises(RuntimeError, match=message):
        getattr(backend.ops, name)(*given, **keywords)
