"""The memory of a paged cache: its shape is the model's, its blocks are copied in all layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from forward_passes import Sequences, alone, poison, prompts, runner_of
from plain_models import PlainLm

from decoders import DECODERS, build
from pumice.decode import CachePool, ModelRunner
from pumice.decode.scales import measure_scales

LAYERS = [(2, 8, 8), (1, 16, 12)]
FLOAT8 = torch.float8_e4m3fn


def scales(*sizes):
    return [(torch.ones(n), torch.ones(n)) for n in sizes]


def test_shapes_and_bytes():
    pool = CachePool(5, 4, LAYERS, torch.bfloat16)
    assert [cache.shape for cache in pool.key_caches] == [(5, 4, 2, 8), (5, 4, 1, 16)]
    assert [cache.shape for cache in pool.value_caches] == [(5, 4, 2, 8), (5, 4, 1, 12)]
    assert {cache.dtype for cache in pool.key_caches + pool.value_caches} == {torch.bfloat16}
    assert pool.nbytes == 5 * 4 * (2 * 16 + 28) * 2
    assert pool.scales(1) == (None, None)
    assert pool.k_scale is None
    assert repr(pool) == "CachePool(5 blocks of 4 tokens, 2 layers, bfloat16, cpu, 0.0 MiB)"


@pytest.mark.parametrize("name", DECODERS)
def test_the_pool_of_a_model(name):
    model = build(name)
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pool = CachePool.for_model(model, num_blocks=3, block_size=8)
    assert pool.layers == ((kv_heads, dim, dim),) * config.num_hidden_layers
    assert pool.dtype == torch.float32
    assert CachePool.bytes_per_block(model, block_size=8) * 3 == pool.nbytes
    assert CachePool.bytes_per_block(model, block_size=8, cache_dtype=FLOAT8) * 12 == pool.nbytes


def test_the_pool_of_a_model_in_sixteen_bits():
    pool = CachePool.for_model(PlainLm().half(), num_blocks=2)
    assert pool.cache_dtype == torch.float16
    assert pool.layers == ((2, 8, 12),) * 2
    assert pool.block_size == 16


def test_a_pool_made_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode():
        pool = CachePool(1, 1, LAYERS, torch.float32)
    pool.key_caches[0].zero_()
    assert not pool.key_caches[0].is_inference()


@pytest.mark.parametrize("cache_dtype", [None, FLOAT8, torch.int8])
def test_copies_of_blocks(cache_dtype):
    given = scales(2, 1) if cache_dtype else None
    pool = CachePool(6, 4, LAYERS, torch.float32, cache_dtype, scales=given)
    caches = [cache.view(torch.uint8) for cache in pool.key_caches + pool.value_caches]
    for cache in caches:
        cache.random_(0, 255, generator=torch.Generator().manual_seed(0))
    before = [cache.clone() for cache in caches]
    pool.copy_blocks(np.array([[0, 3], [5, 1]]))
    pool.copy_blocks(np.empty((0, 2), np.int64))
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache, old[[0, 5, 2, 0, 4, 5]])


def test_a_pool_that_fits():
    pool = CachePool(1, 1, LAYERS, torch.float16)
    cpu = torch.device("cpu")
    assert pool.fits(pool.layers, torch.float16, cpu)
    assert pool.fits(pool.layers[:1], torch.float16, cpu)
    assert not pool.fits(pool.layers[1:], torch.float16, cpu)
    assert not pool.fits(pool.layers, torch.float32, cpu)
    assert not pool.fits(pool.layers, torch.float16, torch.device("cuda"))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 4, LAYERS, torch.half), {}, ValueError, "num_blocks must be at least 1, not 0"),
        ((1, 0, LAYERS, torch.half), {}, ValueError, "block_size must be at least 1, not 0"),
        ((1, 1, [], torch.half), {}, ValueError, "layers must be one or more"),
        ((1, 1, [(1, 0, 2)], torch.half), {}, ValueError, r"least 1, not \[\(1, 0, 2\)\]"),
        ((1, 1, LAYERS, torch.double), {}, TypeError, "float32, float16 or bfloat16, not float64"),
        (
            (1, 1, LAYERS, torch.half, torch.float32),
            {},
            TypeError,
            "cache_dtype must be float16, that of the model's keys, or float8_e4m3fn or int8",
        ),
        ((1, 1, LAYERS, torch.half, torch.int8), {}, ValueError, "needs scales, a pair"),
        (
            (1, 1, LAYERS, torch.half, torch.int8),
            {"scales": scales(1)},
            ValueError,
            "each of 2 layers, not 1 of them",
        ),
        (
            (1, 1, LAYERS, torch.half, torch.int8),
            {"scales": scales(2, 3)},
            ValueError,
            r"k_scale of layer 1 must be float32 \[1\] or \[1\], not float32 \[3\]",
        ),
        ((1, 1, LAYERS, torch.half), {"scales": scales(2, 1)}, ValueError, "not of float16"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        CachePool(*arguments, **options)


@pytest.mark.parametrize("cache_dtype", [FLOAT8, torch.int8])
def test_scales_reach_as_far_as_the_keys(cache_dtype):
    model = build("qwen2")  # biases make some channels of the keys large
    (tokens,) = prompts(30)
    runner, manager = runner_of(model)
    Sequences(runner, manager, [tokens]).forward(30)
    limit = 448 if cache_dtype == FLOAT8 else 127
    measured = measure_scales(model, cache_dtype, tokens, margin=1.0)
    for layer, pair in enumerate(measured):
        for cache, scale in zip(
            (runner.pool.key_caches[layer], runner.pool.value_caches[layer]), pair, strict=True
        ):
            largest = cache.flatten(0, 1)[:30].abs().amax((0, 2))
            torch.testing.assert_close(scale * limit, largest)
    wide = measure_scales(model, cache_dtype, tokens, margin=2.0)
    torch.testing.assert_close(wide[1][0], 2 * measured[1][0])


@pytest.mark.parametrize(("cache_dtype", "tolerance"), [(FLOAT8, 0.05), (torch.int8, 0.025)])
def test_a_cache_of_bytes_is_nearly_as_good(cache_dtype, tolerance):
    """Rounding of float8 is 2^-4 relative at most, of int8 1/254 of the head's largest number."""
    model = build("llama")
    tokens = prompts(30, 12)
    runner, manager = runner_of(model, cache_dtype=cache_dtype)
    assert runner.pool.nbytes * 4 == runner_of(model)[0].pool.nbytes
    assert [scale.shape for scale in runner.pool.k_scale] == [(2,), (2,)]
    sequences = Sequences(runner, manager, tokens)
    first, second = sequences.forward(20, 11), sequences.forward(10, 1)
    for index, row in enumerate(tokens):
        wanted = alone(model, row)
        error = torch.cat([first[index], second[index]]) - wanted
        assert error.norm() <= tolerance * wanted.norm() * 2
        assert error.norm() > 1e-4 * wanted.norm()  # the bytes were read


def test_scales_of_another_text():
    model = build("llama")
    own = measure_scales(model, FLOAT8, prompts(40)[0])
    runner = ModelRunner(
        model, pool=CachePool.for_model(model, num_blocks=4, cache_dtype=FLOAT8, scales=own)
    )
    assert torch.equal(runner.pool.v_scale[1], own[1][1])
    drawn = measure_scales(model, FLOAT8)
    assert torch.equal(drawn[0][0], measure_scales(model, FLOAT8)[0][0])
    # Random tokens make keys of the size that others make.
    assert all((a / b > 0.5).all() and (a / b < 2).all() for a, b in zip(drawn[1], own[1]))  # noqa: B905


def test_scales_of_a_model_for_short_texts():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=20)
    )
    assert len(measure_scales(model, torch.int8)) == 1


def test_scales_that_cannot_be_measured():
    model = build("llama")
    with pytest.raises(TypeError, match="cache_dtype must be float8_e4m3fn or int8, not float16"):
        measure_scales(model, torch.float16)
    with pytest.raises(ValueError, match="tokens must be one or more"):
        measure_scales(model, torch.int8, [])
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0].fill_(torch.nan)
    with pytest.raises(ValueError, match="layer 1 are not finite"):
        measure_scales(model, torch.int8, [1, 2])
    assert poison(CachePool(1, 1, LAYERS, torch.half)).key_caches[0].isnan().all()
