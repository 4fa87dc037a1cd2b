"""Shapes that take every way through sparse24_gemm, which small random shapes do not reach.

The names say which tile the emulated device chooses (4 SMs, 163 KB); on a GPU the same shapes are
merely products of unusual size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backends import Backend

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

# M, N, K, dtype. K = 4 mod 16 (int8: mod 32) makes rows that begin at any address.
FLOATING = {
    "8 tokens": (3, 70, 528, HALF),
    "8 tokens, metadata in rows of whole chunks": (8, 270, 512, BRAIN),
    "8 tokens, K in two parts": (1, 64, 2064, BRAIN),
    "8 tokens, rows of any address": (5, 70, 580, BRAIN),
    "32 tokens": (20, 130, 528, HALF),
    "64 tokens": (50, 130, 272, BRAIN),
    "64 tokens, rows of any address": (70, 140, 204, HALF),
    "128 tokens": (140, 100, 208, BRAIN),
    "256 rows": (140, 300, 208, HALF),
    "256 rows, nine tiles along M": (1040, 140, 48, BRAIN),
    "less than a step": (2, 3, 4, HALF),
    "fp32, 1 token, rows shared by 8 warps": (1, 7, 1060, SINGLE),
    "fp32, 2 tokens, rows shared by 2 warps": (2, 130, 260, SINGLE),
    "fp32, 4 tokens, no rows shared": (3, 270, 132, SINGLE),
    "fp32, tokens in two tiles": (11, 9, 516, SINGLE),
    "fp32, one group": (5, 1, 4, SINGLE),
    "fp32, written out dense": (64, 40, 68, SINGLE),
    "fp32, written out dense in three parts": (64, 700, 132, SINGLE),
}
INT8 = {
    "8 tokens": (3, 70, 1056, SINGLE),
    "8 tokens, K in two parts": (1, 64, 4128, HALF),
    "8 tokens, rows of any address": (5, 70, 1060, BRAIN),
    "32 tokens": (20, 130, 544, HALF),
    "64 tokens": (50, 130, 288, SINGLE),
    "64 tokens, rows of any address": (70, 140, 204, BRAIN),
    "128 tokens": (140, 100, 416, BRAIN),
    "256 rows": (140, 300, 416, HALF),
    "less than a step": (2, 3, 4, HALF),
}
# M, N, K, dtype, group_size, bits, zeros
INT4 = {
    "8 tokens, groups of 128": (7, 70, 1024, HALF, 128, 4, "integer"),
    "8 tokens, groups of 64": (3, 33, 576, BRAIN, 64, 4, "integer"),
    "8 tokens, K in two parts": (1, 64, 4160, BRAIN, 192, 4, None),
    "8 tokens, rows of any address": (5, 70, 1036, HALF, 128, 4, "integer"),
    "16 tokens, one group": (13, 70, 576, BRAIN, -1, 4, "integer"),
    "32 tokens": (32, 64, 640, HALF, 128, 4, None),
    "64 tokens": (50, 130, 448, BRAIN, 64, 4, "integer"),
    "64 tokens, rows of any address": (40, 140, 204, HALF, 64, 4, "integer"),
    "128 tokens": (140, 100, 256, HALF, 128, 4, "integer"),
    "written out: groups of 32": (3, 40, 208, BRAIN, 32, 4, "integer"),
    "written out: fractional zeros": (9, 40, 208, HALF, 64, 4, "float"),
    "written out: 3 bits": (3, 40, 208, HALF, 64, 3, "integer"),
    "written out: many tokens": (520, 20, 64, BRAIN, 64, 4, "integer"),
    "written out: fp32": (3, 40, 208, SINGLE, 64, 4, "integer"),
    "written out in two parts: fp32": (3, 600, 512, SINGLE, -1, 2, None),
    "written out in three parts": (3, 600, 1024, HALF, 32, 4, "integer"),
    "written out in two parts, rows of any address": (2, 301, 1036, BRAIN, 64, 3, "float"),
}


def on_cuda(backend: Backend) -> Backend:
    if backend.name == "cpu":
        pytest.skip("the tiles of the CUDA kernels")
    return backend


def kept_places(n: int, k: int) -> Tensor:
    """Two random columns of each group of four, as a mask [N, K]."""
    best = torch.rand(n, k // 4, 4).topk(2, dim=-1).indices
    return torch.zeros(n, k // 4, 4, dtype=torch.bool).scatter_(-1, best, True).view(n, k)


def compress(backend: Backend, w: Tensor) -> tuple[Tensor, Tensor]:
    values, meta = backend.ops.sparse24_compress(w.to(backend.device))
    return values, meta


def spread(kept: Tensor, places: Tensor) -> Tensor:
    """W with the values [N, K/2] at the places of the mask [N, K], in float64."""
    w = torch.zeros(places.shape, dtype=torch.float64)
    w[places] = kept.double().flatten()
    return w


def assert_product(y: Tensor, x: Tensor, w: Tensor, bias: Tensor, rounded_weights: float) -> None:
    """y = x·wᵀ + bias in float64, up to the rounding of y and fp32 sums, and of the weights."""
    x = x.double()
    expected = x @ w.T + bias.double()
    magnitude = x.abs() @ w.abs().T + bias.double().abs()
    unit = torch.finfo(y.dtype).eps / 2
    bound = 1.01 * unit * expected.abs() + (2.0**-18 + rounded_weights * unit) * magnitude
    assert ((y.cpu().double() - expected).abs() <= bound + 1e-6).all()


@pytest.mark.parametrize("case", FLOATING.values(), ids=FLOATING.keys())
def test_floating_point(backend: Backend, case: tuple[int, int, int, torch.dtype]) -> None:
    on_cuda(backend)
    m, n, k, dtype = case
    torch.manual_seed(0)
    w = (torch.randn(n, k) * kept_places(n, k)).to(dtype)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
    values, meta = compress(backend, w)
    y = backend.ops.sparse24_linear(x.to(backend.device), values, meta, bias.to(backend.device))
    assert y.dtype == dtype
    assert_product(y, x, w.double(), bias, 0)


@pytest.mark.parametrize("case", INT8.values(), ids=INT8.keys())
@pytest.mark.parametrize("scales", ["each", "one"])
def test_int8(backend: Backend, case: tuple[int, int, int, torch.dtype], scales: str) -> None:
    """The sums are exact: what remains are the roundings of three operations and of y."""
    on_cuda(backend)
    m, n, k, out_dtype = case
    torch.manual_seed(0)
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8) * kept_places(n, k)
    q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    scale = 0.001 * (torch.rand(m if scales == "each" else 1) + 0.5)
    weight_scale = torch.rand(n if scales == "each" else 1) + 0.5
    bias = torch.randn(n).half()
    values, meta = compress(backend, w)
    moved = [t.to(backend.device) for t in (q, scale, weight_scale, bias)]
    y = backend.ops.sparse24_int8_linear(
        moved[0], moved[1], values, meta, moved[2], moved[3], out_dtype=out_dtype
    )
    scaled = (q.double() @ w.double().T) * scale.double().unsqueeze(-1) * weight_scale.double()
    expected = scaled + bias.double()
    bound = 3 * 2.0**-24 * (scaled.abs() + bias.abs()) + torch.finfo(y.dtype).eps * expected.abs()
    assert y.dtype == out_dtype
    assert ((y.cpu().double() - expected).abs() <= bound).all()


def int4_tensors(case: tuple[Any, ...]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The arguments of sparse24_int4_linear but for meta, the places that are kept, and W."""
    m, n, k, dtype, group_size, bits, zeros_kind = case
    torch.manual_seed(0)
    places = kept_places(n, k)
    groups = 1 if group_size == -1 else -(-k // group_size)
    codes = torch.randint(0, 2**bits, (n, k // 2), dtype=torch.uint8)
    scales = (torch.rand(n, groups) * 0.1 + 0.01).to(dtype)
    zeros: Tensor | None = None
    if zeros_kind == "integer":
        zeros = torch.randint(0, 2**bits, (n, groups), dtype=torch.uint8)
    elif zeros_kind == "float":
        zeros = (torch.rand(n, groups) * 2**bits).to(dtype)
    group = torch.arange(k // 2) // (k if group_size == -1 else group_size // 2)
    centre = zeros.double()[:, group] if zeros is not None else 2.0 ** (bits - 1)
    w = spread((codes.double() - centre) * scales.double()[:, group], places)
    arguments = {
        "x": torch.randn(m, k).to(dtype),
        "qvalues": codes,
        "scales": scales,
        "zeros": zeros,
        "bias": torch.randn(n),
    }
    return arguments, places, w


def run_int4(
    backend: Backend, case: tuple[Any, ...], arguments: dict[str, Any], places: Tensor
) -> Tensor:
    moved = {k: v if v is None else v.to(backend.device) for k, v in arguments.items()}
    moved["qvalues"] = backend.ops.int4_pack(moved["qvalues"], case[5])
    _, meta = compress(backend, places.to(torch.int8))
    y: Tensor = backend.ops.sparse24_int4_linear(
        **moved, meta=meta, group_size=case[4], bits=case[5]
    )
    return y


@pytest.mark.parametrize("name", INT4)
def test_int4(backend: Backend, name: str) -> None:
    on_cuda(backend)
    case = INT4[name]
    arguments, places, w = int4_tensors(case)
    y = run_int4(backend, case, arguments, places)
    assert y.dtype == case[3]
    rounded = 2 if name.startswith("written out") else 0
    assert_product(y, arguments["x"], w, arguments["bias"], rounded)


def test_parts_of_k_add_up_in_one_order(backend: Backend) -> None:
    """Whoever takes the last ticket of a tile: the same bits."""
    on_cuda(backend)
    torch.manual_seed(0)
    w = (torch.randn(20, 4112) * kept_places(20, 4112)).half()
    values, meta = compress(backend, w)
    x = torch.randn(3, 4112).half().to(backend.device)
    first = backend.ops.sparse24_linear(x, values, meta, None)
    for _ in range(4):
        assert torch.equal(backend.ops.sparse24_linear(x, values, meta, None), first)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("shape", [(9, 70, 208), (5, 20, 52)], ids=["aligned", "any address"])
def test_not_finite(backend: Backend, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """What is not finite stays in its token, and is seen by the rows that keep its column only:
    neither by what is padded nor by what was pruned."""
    on_cuda(backend)
    m, n, k = shape
    torch.manual_seed(0)
    places = kept_places(n, k)
    w = ((torch.randn(n, k).abs() + 0.1) * places).to(dtype)
    values, meta = compress(backend, w)
    x = torch.randn(m, k).to(dtype)
    x[1, k - 1], x[3, 0] = float("inf"), float("nan")
    y = backend.ops.sparse24_linear(x.to(backend.device), values, meta, None).cpu()
    expected = torch.ones(m, n, dtype=torch.bool)
    expected[1], expected[3] = ~places[:, k - 1], ~places[:, 0]
    assert torch.equal(y.isfinite(), expected)
    assert (y[1][places[:, k - 1]] == float("inf")).all()


def test_not_finite_in_fp32(backend: Backend) -> None:
    """What was pruned may be multiplied as zero; other tokens are unharmed."""
    on_cuda(backend)
    torch.manual_seed(0)
    w = torch.randn(30, 132).abs() * kept_places(30, 132)
    values, meta = compress(backend, w)
    x = torch.randn(9, 132)
    expected = backend.ops.sparse24_linear(x.to(backend.device), values, meta, None).cpu()
    x[1, 131], x[8, 0] = float("inf"), float("nan")
    y = backend.ops.sparse24_linear(x.to(backend.device), values, meta, None).cpu()
    assert not y[1][w[:, 131] != 0].isfinite().any()
    assert not y[8][w[:, 0] != 0].isfinite().any()
    others = [0, *range(2, 8)]
    assert torch.equal(y[others], expected[others])


def at_odd_address(tensor: Tensor) -> Tensor:
    """The same elements, beginning one element after an aligned address."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return room[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, torch.int8])
def test_tensors_at_any_address(backend: Backend, dtype: torch.dtype) -> None:
    on_cuda(backend)
    torch.manual_seed(0)
    n, k = 40, 256
    w = (torch.randint(-9, 10, (n, k)) * kept_places(n, k)).to(dtype)
    x = torch.randint(-9, 10, (6, k)).to(dtype).to(backend.device)
    values, meta = compress(backend, at_odd_address(w))
    tensors = [at_odd_address(t) for t in (x, values, meta)]
    assert torch.equal(backend.ops.sparse24_decompress(tensors[1], tensors[2]).cpu(), w)
    assert torch.equal(
        backend.ops.sparse24_gather(at_odd_address(w).to(backend.device), tensors[2]), values
    )
    expected = x.cpu().double() @ w.double().T
    if dtype != torch.int8:
        y = backend.ops.sparse24_linear(*tensors, None)
    else:
        one = torch.ones(1, device=backend.device)
        y = backend.ops.sparse24_int8_linear(
            tensors[0], one, tensors[1], tensors[2], one, None, out_dtype=SINGLE
        )
    assert torch.equal(y.cpu().double(), expected)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN, torch.int8])
def test_compression_keeps_the_first_nonzeros(backend: Backend, dtype: torch.dtype) -> None:
    """Every pattern of four, three and four nonzeros included, which pumice.ops refuses first."""
    on_cuda(backend)
    masks = torch.arange(16)[:, None] >> torch.arange(4) & 1
    w = (masks * torch.tensor([[1, -2, 3, -4]])).to(dtype)
    if dtype != torch.int8:
        w[w == 0] = -0.0
    else:
        w[1, 0] = -128
    values, meta = compress(backend, w)
    for mask in range(16):
        nonzeros = [c for c in range(4) if mask >> c & 1][:2]
        free = [c for c in range(4) if c not in nonzeros]
        columns = sorted(nonzeros + free[: 2 - len(nonzeros)])
        assert int(meta[mask, 0]) & 15 == columns[0] | columns[1] << 2
        assert torch.equal(values[mask].cpu(), w[mask, columns])


DENSE_FROM = "PUMICE_SPARSE24_DENSE_FROM"


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN])
@pytest.mark.parametrize("bias_dtype", [None, SINGLE, BRAIN])
def test_written_out_dense(
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:
    """From a number of tokens on: here in three parts of the rows, and the last one smaller."""
    on_cuda(backend)
    torch.manual_seed(0)
    n, k = 700, 260
    w = (torch.randn(n, k) * kept_places(n, k)).to(dtype)
    x = torch.randn(5, k).to(dtype).to(backend.device)
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype).to(backend.device)
    values, meta = compress(backend, w)
    weights = values, meta, bias
    monkeypatch.setenv(DENSE_FROM, "5")
    dense = backend.ops.sparse24_linear(x, *weights)
    few = backend.ops.sparse24_linear(x[:4], *weights)
    monkeypatch.setenv(DENSE_FROM, "6")
    sparse = backend.ops.sparse24_linear(x, *weights)
    added = torch.zeros(n) if bias is None else bias.cpu().float()
    assert_product(dense, x.cpu(), w.double(), added, 1)  # the sum is rounded before the bias
    assert torch.equal(few, sparse[:4])  # by the kernel
    product = x.cpu() @ w.T
    expected = product if bias is None else (product.float() + added).to(dtype)
    assert torch.equal(dense.cpu(), expected) or backend.name == "cuda"


def test_int4_written_out_dense(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of writing out, one after the other, in parts."""
    on_cuda(backend)
    monkeypatch.setenv(DENSE_FROM, "1")
    for dtype in (SINGLE, HALF):
        case = (3, 600, 1024, dtype, 32, 4, "integer")
        arguments, places, w = int4_tensors(case)
        y = run_int4(backend, case, arguments, places)
        assert_product(y, arguments["x"], w, arguments["bias"], 3)


@pytest.mark.parametrize("value", ["", "many", "5 tokens", "-1"])
def test_a_number_that_is_none(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    on_cuda(backend)
    values, meta = compress(backend, torch.zeros(8, 16))
    x = torch.zeros(1, 16, device=backend.device)
    monkeypatch.setenv(DENSE_FROM, value)
    with pytest.raises(RuntimeError, match=f"{DENSE_FROM} must be a number of tokens, not {value}"):
        backend.ops.sparse24_linear(x, values, meta, None)
