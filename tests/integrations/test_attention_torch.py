"""torch's scaled_dot_product_attention on pumice's kernels, by torch's hook for providers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pumice.integrations import attention_torch
from pumice.ops import _library

attention = torch.nn.attention


@pytest.fixture
def calls(monkeypatch):
    """The provider, active; the names of the operators that it called."""
    called = []

    class Spy:
        def __getattr__(self, name):
            called.append(name)
            return getattr(torch.ops.pumice, name)

    monkeypatch.setattr(_library, "ops", Spy())
    attention.activate_flash_attention_impl("pumice")
    yield called
    attention.restore_flash_attention_impl()


def make(queries=9, keys=9, heads=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, n, 16) for n in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def by_math(q, k, v, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(
            *(t.detach().double().requires_grad_() for t in (q, k, v)), **options
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.ones(9, 9).tril(2).bool()}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_forward(calls, dtype, options):
    q, k, v = make(dtype=dtype)
    out = functional.scaled_dot_product_attention(q, k, v, **options)
    assert calls[-1] == "flash_attention"
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        out.double(), by_math(q, k, v, **options), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 12), (12, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_backward(calls, queries, keys, masked):
    ours = make(queries, keys)
    theirs = [t.detach().double().requires_grad_() for t in ours]
    options = {"is_causal": True}
    if masked:
        seen = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.6
        options = {"attn_mask": seen}
    out = functional.scaled_dot_product_attention(*ours, **options)
    with sdpa_kernel(SDPBackend.MATH):
        reference = functional.scaled_dot_product_attention(*theirs, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    out.backward(weights)
    reference.backward(weights.double())
    assert "flash_attention_backward" in calls
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5)


def test_a_transformer_of_torch(calls):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 11, 32)
    out = layer(x)
    assert "flash_attention" in calls
    attention.restore_flash_attention_impl()
    torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-5)
    attention.activate_flash_attention_impl("pumice")


@pytest.mark.filterwarnings("error")
def test_activating_is_quiet():
    attention.activate_flash_attention_impl("pumice")
    attention.restore_flash_attention_impl()


def test_torch_has_its_own_kernels_back_afterwards(calls):
    q, k, v = make()
    attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
    functional.scaled_dot_product_attention(q, k, v).sum().backward()
    functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert not calls
    attention.activate_flash_attention_impl("pumice")


def test_the_form_that_cuda_is_given():
    """The kernels for CUDA are the same functions in another form: here on tensors of the CPU."""
    q, k, v = (t.detach() for t in make())
    results = attention_torch._cuda_forward(q, k, v, is_causal=True)
    schema = torch.ops.aten._scaled_dot_product_flash_attention.default._schema
    assert len(results) == len(schema.returns)
    reference = by_math(q, k, v, is_causal=True)
    torch.testing.assert_close(results[0].double(), reference, rtol=1e-5, atol=1e-5)
    grads = attention_torch._cuda_backward(
        torch.ones_like(q), q, k, v, *results[:2], *results[2:6], 0.0, True, *results[6:8]
    )
    schema = torch.ops.aten._scaled_dot_product_flash_attention_backward.default._schema
    assert len(schema.arguments) == 15
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def test_refused(calls):
    q, k, v = make()
    sdpa = functional.scaled_dot_product_attention
    restore = r"restore_flash_attention_impl\(\) brings torch's own kernel back"
    with pytest.raises(RuntimeError, match=f"query is float64.*{restore}"):
        sdpa(q.double(), k.double(), v.double())
    with pytest.raises(RuntimeError, match="a bias, which is not supported"):
        sdpa(q, k, v, attn_mask=torch.full((9, 9), 0.5))
    with pytest.raises(RuntimeError, match=r"dropout_p is 0\.1"):
        attention_torch._cpu_forward(q, k, v, 0.1)
