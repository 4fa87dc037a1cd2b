"""transformers' own generate over a paged cache gives the tokens that it gives over its own."""

from __future__ import annotations

import copy

import pytest
import torch
from forward_passes import poison
from plain_models import PlainLm

import pumice.integrations.transformers  # noqa: F401  registers "pumice"
from decoders import DECODERS, build
from pumice.decode import CachePool, OutOfBlocksError, PagedCache
from pumice.integrations import attention

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
}


def made(name, implementation):
    model = build(name)
    model.set_attn_implementation(implementation)
    model.generation_config.update(pad_token_id=0, eos_token_id=None, bos_token_id=1)
    return model


def paged(model, num_blocks=200, block_size=4, **options):
    cache = PagedCache(model, num_blocks, block_size, **options)
    poison(cache.pool)
    return cache


def prompt(side=None, batch=3, tokens=11):
    ids = torch.randint(1, 61, (batch, tokens), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if side:
        mask[0, :4] = 0
        mask[2, :1] = 0
        mask = mask if side == "left" else mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model, inputs, cache=None, new=14, **options):
    torch.manual_seed(0)
    options = {"do_sample": False, **options}
    return model.generate(**inputs, max_new_tokens=new, past_key_values=cache, **options)


@pytest.mark.parametrize("implementation", ["eager", "pumice"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DECODERS)
def test_the_same_tokens(name, mode, implementation):
    model = made(name, implementation)
    expected = generate(model, prompt("left"), **MODES[mode])
    cache = paged(model)
    assert torch.equal(generate(model, prompt("left"), cache, **MODES[mode]), expected)
    length = 11 + 14 - 1  # the last token was never read
    assert cache.get_seq_length() == length
    stats = cache.stats()
    if mode == "greedy" and implementation == "pumice" and cache.manager.window_left is None:
        assert stats.tokens == 3 * length - 5  # padding takes no memory
        assert stats.used_blocks == sum(-(-(length - pads) // 4) for pads in (4, 0, 1))
    if mode == "beams":
        assert stats.shared_blocks > 0
    cache.reset()
    assert cache.stats().free_blocks == 200
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(model, prompt("left"), cache, **MODES[mode]), expected)


def test_only_pages_are_read(monkeypatch):
    monkeypatch.setattr(attention, "flash_attention", lambda *a, **k: pytest.fail("not the pages"))
    model = made("gemma2, softcap", "pumice")
    monkeypatch.setattr(PagedCache, "_gather", lambda *a, **k: pytest.fail("gathered"))
    generate(model, prompt(), paged(model))


def test_blocks_out_of_the_window_are_free_again():
    model = made("mistral, window", "pumice")
    cache = paged(model, num_blocks=3 * 4)
    expected = generate(model, prompt(), new=60)
    assert torch.equal(generate(model, prompt(), cache, new=60), expected)
    gathering = made("mistral, window", "eager")
    with pytest.raises(OutOfBlocksError):
        generate(gathering, prompt(), paged(gathering, num_blocks=3 * 4), new=60)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "pumice"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_chunks_with_padding(side, implementation):
    model = made("llama", implementation)
    inputs = prompt(side)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(**inputs, position_ids=positions).logits
    cache = paged(model)
    if side == "left":  # a first chunk in which there is nothing but padding
        inputs["input_ids"], mask, positions = (
            torch.cat([torch.zeros(3, 2, dtype=torch.long), t], 1)
            for t in (inputs["input_ids"], mask, positions)
        )
        expected = torch.cat([expected[:, :2], expected], 1)
    out = []
    for start, stop in ((0, 2), (2, 3), (3, 9), (9, 10), (10, mask.shape[1])):
        piece = slice(start, stop)
        logits = model(
            inputs["input_ids"][:, piece],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, piece],
            past_key_values=cache,
        ).logits
        out.append(logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(out, 1)[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "pumice"])
def test_a_conversation_goes_on(implementation):
    model = made("qwen2", implementation)
    cache = paged(model)
    inputs = prompt(batch=1)
    for _ in range(3):
        told = generate(model, inputs, cache, new=5)
        assert torch.equal(told, generate(model, inputs, new=5))
        more = torch.cat([told, torch.tensor([[5, 9, 3]])], 1)
        inputs = {"input_ids": more, "attention_mask": torch.ones_like(more)}


@pytest.mark.parametrize("implementation", ["eager", "pumice"])
@pytest.mark.parametrize("name", ["llama", "gemma2, softcap"])
def test_assisted_generation_takes_tokens_back(name, implementation, monkeypatch):
    model = made(name, implementation)
    repeated = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    inputs = {"input_ids": repeated, "attention_mask": torch.ones_like(repeated)}
    model.generation_config.eos_token_id = 60  # transformers 4 cannot do without one here
    expected = generate(model, inputs)
    crops = []
    crop = PagedCache.crop
    monkeypatch.setattr(
        PagedCache, "crop", lambda self, n: (crops.append(self.get_seq_length()), crop(self, n))
    )
    out = generate(model, inputs, paged(model), prompt_lookup_num_tokens=3)
    assert torch.equal(out, expected)
    assert crops


@torch.no_grad()
def test_crop_forgets_the_last_tokens():
    model = made("llama", "pumice")
    inputs = prompt("left")
    cache = paged(model)
    model(**inputs, past_key_values=cache)
    before = cache.stats()
    extra = torch.ones(3, 1, dtype=torch.long)
    longer = torch.cat([inputs["attention_mask"], extra, extra], 1)
    model(torch.full((3, 2), 7), attention_mask=longer, past_key_values=cache)
    cache.crop(0)
    cache.crop(-2)
    assert cache.get_seq_length() == 11
    assert cache.stats() == before
    cache.crop(-100)
    assert cache.get_seq_length() == 0
    assert cache.stats().used_blocks == 0


@torch.no_grad()
def test_repeated_and_selected_sequences_share_blocks():
    model = made("llama", "pumice")
    cache = paged(model)
    model(**prompt(batch=2), past_key_values=cache)
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6
    assert cache.stats().used_blocks == cache.stats().shared_blocks == 6
    out = model(torch.arange(1, 7)[:, None], past_key_values=cache).logits
    cache.batch_select_indices(torch.tensor([True, False, False, False, True, False]))
    assert cache.batch_size == 2
    assert cache.stats().shared_blocks == 0
    whole = torch.cat([prompt(batch=2)["input_ids"], torch.tensor([[1], [5]])], 1)
    expected = model(whole).logits[:, -1]
    torch.testing.assert_close(out[[0, 4], 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.int8])
@torch.no_grad()
def test_a_cache_of_bytes(cache_dtype):
    """What attention reads from the pages is what is gathered from them; and nearly exact."""
    logits = []
    for implementation in ("eager", "pumice"):
        model = made("llama", implementation)
        cache = paged(model, cache_dtype=cache_dtype)
        model(prompt()["input_ids"][:, :7], past_key_values=cache)
        logits.append(model(prompt()["input_ids"][:, 7:], past_key_values=cache).logits)
        assert cache.pool.nbytes * 4 == paged(model).pool.nbytes
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    exact = model(prompt()["input_ids"]).logits[:, 7:]
    assert (logits[1] - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("implementation", ["eager", "pumice"])
@torch.no_grad()
def test_out_of_blocks_leaves_the_cache_as_it_was(implementation):
    model = made("llama", implementation)
    cache = paged(model, num_blocks=3 * 3)  # 12 tokens each
    model(**prompt(), past_key_values=cache)
    before = cache.stats()
    with pytest.raises(OutOfBlocksError, match="blocks"):
        model(torch.full((3, 2), 7), past_key_values=cache)
    assert cache.stats() == before
    assert cache.get_seq_length() == 11
    out = model(torch.full((3, 1), 7), past_key_values=cache).logits[:, 0]
    whole = torch.cat([prompt()["input_ids"], torch.full((3, 1), 7)], 1)
    torch.testing.assert_close(out, model(whole).logits[:, -1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_does_not_fit_together_is_refused():
    model = made("llama", "pumice")
    cache = paged(model)
    model(**prompt("left"), past_key_values=cache)
    with pytest.raises(ValueError, match="holds 3 sequences, but a batch of 2 came"):
        model(torch.ones(2, 1, dtype=torch.long), past_key_values=cache)
    one = torch.full((3, 1), 7)
    with pytest.raises(ValueError, match="other padding than that of the 11 that came before"):
        model(one, attention_mask=torch.ones(3, 12), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="four-dimensional attention_mask"):
        model(one, attention_mask=torch.zeros(3, 1, 1, 12), past_key_values=cache)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"changed to or from 'pumice' .*; call reset\(\) first"):
        model(one, past_key_values=cache)
    with pytest.raises(TypeError, match="a pool is not copied"):
        copy.deepcopy(cache)


@torch.no_grad()
def test_keys_that_were_changed_on_the_way_are_noticed():
    model = made("llama", "pumice")
    cache = paged(model)
    update = cache.update
    cache.update = lambda k, v, *a, **more: tuple(t + 0 for t in update(k, v, *a, **more))
    with pytest.raises(RuntimeError, match="did not read the cache that it was given"):
        model(**prompt(), past_key_values=cache)


def test_bad_arguments():
    model = made("llama", "pumice")
    pool = CachePool.for_model(model, num_blocks=4)
    assert PagedCache(model, pool=pool).pool is pool
    with pytest.raises(ValueError, match="either num_blocks, for a new pool, or pool"):
        PagedCache(model)
    with pytest.raises(ValueError, match="does not fit GPT2LMHeadModel"):
        PagedCache(made("gpt2", "pumice"), pool=pool)
    with pytest.raises(TypeError, match="PlainLm is no model of transformers"):
        PagedCache(PlainLm(), 4)
    cache = PagedCache(model, pool=pool)
    assert cache.stats() is None
    assert cache.batch_size == -1
    cache.crop(-3)  # nothing is there
    cache.reset()
    cache.reorder_cache(torch.tensor([0]))
    with pytest.raises(NotImplementedError, match="updated by the cache"):
        cache.layers[0].update(None, None)
