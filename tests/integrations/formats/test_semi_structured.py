"""torch's semi-structured tensors, both ways, against torch's own conversions on the CPU."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.sparse import _semi_structured_conversions as conversions

from pumice.integrations.formats.semi_structured import from_semi_structured, to_semi_structured
from pumice.ops import sparse24_compress, sparse24_decompress

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


def weight_24(n, k, dtype, seed=0, nonzeros=2):
    """Two nonzeros of every four, or now and then fewer."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        w = torch.randint(-127, 127, (n, k), generator=generator).to(dtype)
    else:
        w = torch.randn(n, k, generator=generator).to(dtype)
    keep = torch.rand(n, k // 4, 4, generator=generator).argsort(2) < nonzeros
    if nonzeros == 2:
        keep &= torch.rand(n, k // 4, 1, generator=generator) > 0.1
    return w * keep.view(n, k)


DTYPES = [torch.float16, torch.bfloat16, torch.int8]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(DTYPES), st.integers(1, 4), st.integers(1, 3), st.integers(0, 100))
def test_torch_reads_what_is_written(dtype, rows, columns, seed):
    w = weight_24(32 * rows, 128 * columns, dtype, seed)
    tensor = to_semi_structured(*sparse24_compress(w))
    assert isinstance(tensor, torch.sparse.SparseSemiStructuredTensorCUTLASS)
    assert tensor.shape == w.shape
    assert tensor.dtype == dtype
    dense = conversions.sparse_semi_structured_to_dense_cutlass(tensor.packed, tensor.meta)
    assert torch.equal(dense, w)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(DTYPES), st.integers(1, 4), st.integers(1, 3), st.integers(0, 100))
def test_what_torch_writes_is_read(dtype, rows, columns, seed):
    w = weight_24(32 * rows, 128 * columns, dtype, seed)
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(w)
    tensor = torch.sparse.SparseSemiStructuredTensorCUTLASS(w.shape, packed, meta, None, None, None)
    values, ours = from_semi_structured(tensor)
    for got, expected in zip((values, ours), sparse24_compress(w), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(sparse24_decompress(values, ours), w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_groups_of_two_nonzeros_have_the_metadata_that_torch_gives(dtype):
    """Then there is no choice, and the bits are the same."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(64, 32, 4, generator=generator).argsort(2) < 2
    w = (torch.rand(64, 128, generator=generator) + 1).to(dtype) * keep.view(64, 128)
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(w)
    tensor = to_semi_structured(*sparse24_compress(w))
    assert torch.equal(tensor.packed, packed)
    assert torch.equal(tensor.meta, meta)


def test_float32_keeps_one_of_two_in_torch():
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(64, 32, 2, generator=generator).argsort(2) < 1
    w = torch.randn(64, 64, generator=generator) * keep.view(64, 64)
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(w)
    tensor = torch.sparse.SparseSemiStructuredTensorCUTLASS(w.shape, packed, meta, None, None, None)
    assert torch.equal(sparse24_decompress(*from_semi_structured(tensor)), w)
    with pytest.raises(ValueError, match=r"not float32 .of float32 torch keeps one of every two"):
        to_semi_structured(*sparse24_compress(w))


@pytest.mark.parametrize(
    ("n", "k", "dtype", "message"),
    [
        (16, 64, torch.float16, r"float16 weights of a multiple of 32 rows and 64.*\[16, 64\]"),
        (32, 96, torch.bfloat16, r"32 rows and 64 columns, not \[32, 96\]"),
        (8, 128, torch.int8, r"int8 weights of a multiple of 16 rows and 128 columns"),
    ],
)
def test_shapes_that_torch_does_not_take(n, k, dtype, message):
    with pytest.raises(ValueError, match=message):
        to_semi_structured(*sparse24_compress(weight_24(n, k, dtype)))


def test_what_is_no_such_tensor():
    with pytest.raises(TypeError, match="expected torch's SparseSemiStructuredTensor, not Tensor"):
        from_semi_structured(torch.zeros(32, 64))
    values, meta = sparse24_compress(weight_24(32, 64, torch.float16))
    transposed = torch.sparse.SparseSemiStructuredTensorCUTLASS(
        torch.Size((64, 32)), None, None, values, meta, None
    )
    with pytest.raises(ValueError, match="holds its transpose alone"):
        from_semi_structured(transposed)


class OnGpu(torch.sparse.SparseSemiStructuredTensorCUSPARSELT):
    """cuSPARSELt's tensor as far as torch's Python goes; the one product is up to the test."""

    is_cuda = True


def cusparselt(cls, w, meta=None):
    """Values, then metadata that nobody may interpret."""
    secret = torch.full((w.numel() // 16,), 77).to(w.dtype)
    packed = torch.cat((sparse24_compress(w)[0].flatten(), secret))
    return cls(w.shape, packed, meta, None, None, None)


# Those of prune_dense_static_sort have a meta too, in a layout that is not CUTLASS's.
@pytest.mark.parametrize("meta", [None, torch.zeros(1, 4, 256)], ids=["plain", "with meta"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cusparselts_tensors_are_read_by_a_product_with_the_identity(dtype, meta, monkeypatch):
    w = weight_24(128, 128, dtype)
    tensor = cusparselt(OnGpu, w, meta if meta is None else meta.to(dtype))

    def product(packed, dense, **options):
        assert packed is tensor.packed
        # torch's int8 products with cuSPARSELt take the dense matrix in columns alone.
        assert dtype != torch.int8 or not dense.is_contiguous()
        return (w.double() @ dense.double()).to(dtype)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    for got, expected in zip(from_semi_structured(tensor), sparse24_compress(w), strict=True):
        assert torch.equal(got, expected)


def test_a_row_that_is_not_finite_is_not_read_as_nan_everywhere(monkeypatch):
    w = weight_24(32, 32, torch.float16)
    tensor = cusparselt(OnGpu, w)
    w[3, w[3].nonzero()[0]] = float("inf")
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda packed, dense, **_: w @ dense)
    with pytest.raises(ValueError, match="NaN or infinite values, which the product"):
        from_semi_structured(tensor)


def test_cusparselts_tensors_away_from_a_gpu_are_refused_with_the_way_out():
    kind = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    with pytest.raises(ValueError, match=r"not public.*on cpu.*sparse24_compress.*to_dense"):
        from_semi_structured(cusparselt(kind, weight_24(32, 32, torch.float16)))
    eight = torch.zeros(32 * 18).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="must be float16, bfloat16 or int8, not float8_e4m3fn"):
        from_semi_structured(kind(torch.Size((32, 32)), eight, None, None, None, None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cutlass", [True, False], ids=["CUTLASS", "cuSPARSELt"])
def test_torch_multiplies_with_ours_and_we_read_torchs(dtype, cutlass):
    w = weight_24(128, 128, dtype).cuda()
    x = torch.randn(64, 128, device="cuda", dtype=dtype)
    ours = to_semi_structured(*sparse24_compress(w))
    torch.testing.assert_close(
        torch.nn.functional.linear(x, ours), torch.nn.functional.linear(x, w), rtol=1e-2, atol=1e-2
    )
    kind = getattr(
        torch.sparse, f"SparseSemiStructuredTensor{'CUTLASS' if cutlass else 'CUSPARSELT'}"
    )
    assert torch.equal(sparse24_decompress(*from_semi_structured(kind.from_dense(w))), w)
    pruned = kind.prune_dense_static_sort(w)
    assert torch.equal(sparse24_decompress(*from_semi_structured(pruned)), pruned.to_dense())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cusparselts_int8_is_read():
    w = weight_24(128, 128, torch.int8).cuda()
    theirs = torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(w)
    assert torch.equal(sparse24_decompress(*from_semi_structured(theirs)), w)
