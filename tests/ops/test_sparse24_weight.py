"""sparse24_compress, sparse24_gather and sparse24_decompress: the canonical form, to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import pumice
from backends import Backend
from sparse24_cases import canonical, prune

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def random(n: int, k: int, dtype: torch.dtype, crowd: float = 0.9) -> Tensor:
    g = torch.Generator().manual_seed(n * k)
    w = torch.randn(n, k, generator=g) * 20
    return prune(w.to(dtype), g, crowd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k"), [(1, 4), (3, 8), (5, 28), (7, 32), (4, 36), (9, 64), (2, 68), (3, 132), (17, 520)]
)
def test_canonical(backend: Backend, n: int, k: int, dtype: torch.dtype) -> None:
    w = random(n, k, dtype)
    values, meta = pumice.ops.sparse24_compress(w.to(backend.device))
    expected_values, expected_meta = canonical(w)
    assert (values.shape, values.dtype) == ((n, k // 2), dtype)
    assert (meta.shape, meta.dtype) == ((n, -(-k // 32) * 4), torch.uint8)
    assert torch.equal(meta.cpu(), expected_meta)
    assert torch.equal(values.cpu(), expected_values)
    assert torch.equal(pumice.ops.sparse24_decompress(values, meta).cpu(), w)
    assert torch.equal(pumice.ops.sparse24_gather(w.to(backend.device), meta), values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_group(backend: Backend, dtype: torch.dtype) -> None:
    """All masks of up to two nonzeros, side by side in one row and in rows of their own."""
    masks = [m for m in itertools.product((0, 1), repeat=4) if sum(m) <= 2]
    w = (torch.tensor(masks) * torch.tensor([5, -6, 7, -8])).to(dtype)
    for matrix in (w, w.reshape(1, -1)):
        values, meta = pumice.ops.sparse24_compress(matrix.to(backend.device))
        expected = canonical(matrix)
        assert torch.equal(values.cpu(), expected[0])
        assert torch.equal(meta.cpu(), expected[1])
        assert torch.equal(pumice.ops.sparse24_decompress(values, meta).cpu(), matrix)


def test_negative_zero_is_zero(backend: Backend) -> None:
    for dtype in DTYPES[:3]:
        w = torch.tensor([[-0.0, 1.0, -0.0, 2.0], [-0.0, -0.0, -0.0, -0.0]], dtype=dtype)
        values, meta = pumice.ops.sparse24_compress(w.to(backend.device))
        assert meta[:, 0].tolist() == [0x4D, 0x44]
        assert torch.equal(pumice.ops.sparse24_decompress(values, meta).cpu(), w)


def test_nan_and_subnormals_are_nonzeros(backend: Backend) -> None:
    nan, inf = float("nan"), float("inf")
    w = torch.tensor([[0.0, 0.0, nan, inf], [0.0, 1e-40, 0.0, -1e-44]])
    values, meta = pumice.ops.sparse24_compress(w.to(backend.device))
    assert meta[:, 0].tolist() == [0x4E, 0x4D]
    again = pumice.ops.sparse24_decompress(values, meta).cpu()
    assert torch.equal(again.view(torch.int32), w.view(torch.int32))


def test_not_sparse(backend: Backend) -> None:
    w = random(70, 64, torch.float16)
    w[41, 20:24] = torch.tensor([1.0, 0.0, 2.0, float("nan")])
    w[69, 0:4] = 1.0
    with pytest.raises(
        ValueError, match=r"w is not 2:4: row 41, group 5 \(columns 20 to 23\)"
    ) as e:
        pumice.ops.sparse24_compress(w.to(backend.device))
    assert "2 groups do" in str(e.value)


def test_the_operator_itself_refuses_on_the_cpu() -> None:
    w = random(300, 512, torch.bfloat16)
    w[257, 508:] = 1.0
    w[299, :4] = 1.0
    with pytest.raises(RuntimeError, match=r"row 257, group 127 \(columns 508 to 511\)"):
        torch.ops.pumice.sparse24_compress(w)


def test_gather_takes_any_matrix(backend: Backend) -> None:
    w = random(6, 40, torch.float16, crowd=1.0)
    _, meta = pumice.ops.sparse24_compress(w.to(backend.device))
    dense = torch.arange(240, dtype=torch.float16).view(6, 40)
    values = pumice.ops.sparse24_gather(dense.to(backend.device), meta).cpu()
    assert torch.equal(values, dense[w != 0].view(6, 20))


def test_strides(backend: Backend) -> None:
    w = random(8, 32, torch.bfloat16).to(backend.device)
    values, meta = pumice.ops.sparse24_compress(w.T.contiguous().T)
    expected = pumice.ops.sparse24_compress(w)
    assert torch.equal(values, expected[0])
    assert torch.equal(meta, expected[1])
    spread = [torch.stack([t, t], -1)[..., 0] for t in (values, meta)]
    assert torch.equal(pumice.ops.sparse24_decompress(*spread), w)
    assert torch.equal(pumice.ops.sparse24_gather(w.T.contiguous().T, spread[1]), values)
