"""Forward passes over packed batches give what each sequence gives alone, family by family."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from forward_passes import Sequences, alone, poison, prompts, runner_of
from plain_models import PlainLm
from torch import nn
from transformers import masking_utils

from decoders import DECODERS, GROUPED, build
from pumice.decode import BlockManager, CachePool, ModelRunner, PagedBatch
from pumice.integrations import attention


def assert_close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=DECODERS)
def model(request):
    return build(request.param)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_chunks_and_decodes_mixed(model, block_size):
    tokens = prompts(23, 9, 14)
    expected = [alone(model, row) for row in tokens]
    sequences = Sequences(*runner_of(model, block_size=block_size, num_blocks=80), tokens)
    # A prompt begins while others decode; one has nothing to do in some passes.
    passes = [sequences.forward(*counts) for counts in ((10, 8, 0), (1, 1, 7), (12, 0, 7))]
    for ours, theirs in zip(zip(*passes, strict=True), expected, strict=True):
        out = torch.cat(ours)
        assert_close(out, theirs[: len(out)])


def test_only_the_rows_asked_for(model):
    tokens = prompts(11, 6)
    runner, manager = runner_of(model)
    batch = Sequences(runner, manager, tokens).batch(11, 6)
    heads = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: heads.append(args[0].shape[-2]))
    out = runner.forward(batch, torch.tensor([16, 10, 3]))
    handle.remove()
    assert heads == [3]
    expected = alone(model, tokens[1])[5], *alone(model, tokens[0])[[10, 3]]
    assert_close(out, torch.stack(expected))


def test_what_left_the_window_is_not_missed():
    model = build("mistral, window")
    (tokens,) = prompts(40)
    runner, manager = runner_of(model, num_blocks=5)  # 20 slots for 40 tokens, window 6
    sequences = Sequences(runner, manager, [tokens])
    out = torch.cat([sequences.forward(n)[0] for n in (9, 1, 8, 8, 1, 1, 9, 3)])
    assert manager.stats().used_blocks < 5
    assert_close(out, alone(model, tokens))


def test_forks_share_blocks_and_part():
    model = build("llama")
    (tokens,) = prompts(10)
    runner, manager = runner_of(model)
    parent = Sequences(runner, manager, [tokens])
    parent.forward(10)
    child = manager.fork(parent.ids)
    ids = [*parent.ids, *child.tolist()]
    step = manager.append(ids, counts=[1, 2])
    assert len(step.copies) == 1
    batch = PagedBatch.from_step(runner.pool, step, [[7], [9, 11]])
    out = runner.forward(batch)
    assert_close(out[0], alone(model, [*tokens, 7])[-1])
    assert_close(out[1:], alone(model, [*tokens, 9, 11])[-2:])


def test_a_tree_of_drafts():
    model = build("qwen2")
    (tokens,) = prompts(9)
    runner, manager = runner_of(model)
    sequences = Sequences(runner, manager, [tokens])
    sequences.forward(9)
    # 1 and 2 follow the prompt; 3 and 4 follow 1; 5 follows 4.
    parents = [-1, -1, 0, 0, 3]
    sees = torch.eye(5, dtype=torch.bool)
    depths = []
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
        depths.append(9 + int(sees[node].sum()) - 1)
    step = manager.append(sequences.ids, counts=[5])
    batch = PagedBatch.from_step(runner.pool, step, [[1, 2, 3, 4, 5]], [depths], sees)
    out = runner.forward(batch)
    for node in range(5):
        branch = [token for token in range(1, 6) if sees[node, token - 1]]
        assert_close(out[node], alone(model, tokens + branch)[-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    exact = build("llama")
    model = copy.deepcopy(exact).to(dtype)
    tokens = prompts(20, 7)
    runner, manager = runner_of(model)
    assert runner.pool.cache_dtype == dtype
    sequences = Sequences(runner, manager, tokens)
    first, second = sequences.forward(12, 6), sequences.forward(8, 1)
    for index, row in enumerate(tokens):
        ours = torch.cat([first[index], second[index]])
        assert ours.dtype == dtype
        wanted = alone(exact, row)
        error = (ours.float() - wanted).norm()
        assert error <= 2 * (alone(model, row).float() - wanted).norm()


def test_no_mask_is_made(model, monkeypatch):
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda *a, **k: pytest.fail("a mask was made"))
    monkeypatch.setattr(attention, "attention_mask", lambda *a, **k: pytest.fail("a mask was made"))
    attention.register()
    try:
        Sequences(*runner_of(model), prompts(8)).forward(8)
    finally:
        monkeypatch.undo()
        attention.register()


def test_the_model_stays_as_it_was(model):
    before = model.config._attn_implementation
    runner, manager = runner_of(model)
    model.train()
    model.get_input_embeddings().eval()
    sequences = Sequences(runner, manager, prompts(8, 8))
    out = runner.forward(sequences.batch(5, 5))
    assert not out.requires_grad
    with pytest.raises(IndexError):
        runner.forward(_with_ids(sequences.batch(1, 1), [3, 61]))
    assert model.config._attn_implementation == before == "eager"
    assert model.training
    assert not model.get_input_embeddings().training
    # Dropout, where the family has one, was off.
    model.eval()
    assert_close(out[5:], alone(model, sequences.tokens[1])[:5])
    assert torch.is_grad_enabled()


def _with_ids(batch, ids):
    batch.input_ids = torch.tensor(ids)
    return batch


def test_an_error_in_the_model_is_no_error_for_the_next_batch():
    model = build("llama")
    runner, manager = runner_of(model)
    sequences = Sequences(runner, manager, prompts(9))
    batch = sequences.batch(6)
    handle = model.model.layers[1].register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        runner.forward(batch)
    handle.remove()
    assert_close(runner.forward(batch), alone(model, sequences.tokens[0])[:6])


def _fail(module, args):
    raise RuntimeError("on purpose")


def test_plain_torch():
    model = PlainLm()
    tokens = prompts(21, 13)
    runner, manager = runner_of(model)
    assert runner.vocab_size == 61
    assert [tuple(layer) for layer in runner.pool.layers] == [(2, 8, 12)] * 2
    sequences = Sequences(runner, manager, tokens)
    first, second = sequences.forward(20, 3), sequences.forward(1, 10)
    for index, row in enumerate(tokens):
        assert_close(torch.cat([first[index], second[index]]), model.alone(row))
    batch = sequences.runner.forward(_again(runner, manager, sequences), torch.tensor([1]))
    assert_close(batch[0], model.alone(tokens[1])[-1])


def _again(runner, manager, sequences):
    step = manager.view(sequences.ids, [1, 1])
    return PagedBatch.from_step(runner.pool, step, [row[-1:] for row in sequences.tokens])


def test_a_pool_can_be_shared_with_a_shallower_model():
    model = build("llama")
    runner, manager = runner_of(model)
    shallow = copy.copy(model)
    shallow = build("llama")
    shallow.model.layers = shallow.model.layers[:1]
    shallow.config.num_hidden_layers = 1
    draft = ModelRunner(shallow, pool=runner.pool)
    tokens = prompts(12)
    sequences = Sequences(draft, manager, tokens)
    assert_close(sequences.forward(12)[0], alone(shallow, tokens[0]))


class Silent(nn.Module):
    """Says that it runs over a paged cache, and does not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 61)

    def forward_paged(self, input_ids, positions, batch, rows):
        return self.embed(input_ids)


class Skipping(PlainLm):
    """Leaves its first layer's attention out from the second batch on."""

    def forward_paged(self, input_ids, positions, batch, rows):
        if len(input_ids) > 1:
            return self.head(self.embed(input_ids))
        return super().forward_paged(input_ids, positions, batch, rows)


def t5():
    config = transformers.T5Config(
        vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


def bloom():
    config = transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2)
    return transformers.BloomForCausalLM(config)


def mamba():
    config = transformers.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1)
    return transformers.MambaForCausalLM(config)


def chunked():
    config = transformers.LlamaConfig(**GROUPED)
    config.layer_types = ["chunked_attention", "full_attention"]
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "gpt2", TypeError, "a torch.nn.Module, not str"),
        (
            lambda: nn.Linear(3, 3),
            TypeError,
            "Linear is no model of transformers and has no method",
        ),
        (Silent, NotImplementedError, "Silent: no layer's attention came to the paged cache"),
        (t5, NotImplementedError, "encoder-decoder models are not supported"),
        (bloom, NotImplementedError, "BloomForCausalLM cannot run over a paged cache: one token"),
        (mamba, NotImplementedError, "MambaForCausalLM"),
        (chunked, NotImplementedError, "layers of type chunked_attention"),
    ],
)
def test_other_models_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        ModelRunner(make(), num_blocks=4)


def test_layers_that_do_not_attend_are_noticed():
    runner, manager = runner_of(Skipping())
    batch = Sequences(runner, manager, prompts(3)).batch(3)
    with pytest.raises(
        RuntimeError, match=r"ran in the layers \[\], but must once in each of 0 … 1"
    ):
        runner.forward(batch)


def test_bad_arguments():
    model = build("llama")
    runner, manager = runner_of(model)
    with pytest.raises(ValueError, match="either num_blocks, for a new pool, or pool"):
        ModelRunner(model)
    with pytest.raises(ValueError, match="either num_blocks, for a new pool, or pool"):
        ModelRunner(model, num_blocks=3, pool=runner.pool)
    with pytest.raises(ValueError, match="does not fit GPT2LMHeadModel"):
        ModelRunner(build("gpt2"), pool=runner.pool)
    with pytest.raises(ValueError, match="does not fit LlamaForCausalLM"):
        ModelRunner(copy.deepcopy(model).bfloat16(), pool=runner.pool)
    batch = Sequences(runner, manager, prompts(5)).batch(5)
    with pytest.raises(TypeError, match="rows must be int64, not int32"):
        runner.forward(batch, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"rows must have shape \[R\], not \[1, 1\]"):
        runner.forward(batch, torch.zeros(1, 1, dtype=torch.int64))
    batch.pool = poison(CachePool.for_model(model, num_blocks=60, block_size=4))
    with pytest.raises(ValueError, match="made for another pool"):
        runner.forward(batch)


def test_no_rows_at_all():
    model = build("llama")
    runner, manager = runner_of(model)
    sequences = Sequences(runner, manager, prompts(5))
    assert runner.forward(sequences.batch(4), torch.empty(0, dtype=torch.int64)).shape == (0, 61)
    assert_close(sequences.forward(1)[0][0], alone(model, sequences.tokens[0])[4])


def test_prefixes_that_were_found_need_not_be_run():
    model = build("llama")
    (tokens,) = prompts(13)
    runner, manager = runner_of(model)
    first = manager.allocate(tokens)
    step = manager.view([first.id], [13])
    runner.forward(PagedBatch.from_step(runner.pool, step, [tokens]))
    manager.commit([first.id])
    second = manager.allocate(tokens)
    assert second.cached_tokens == 12
    step = manager.view([second.id], [1])
    out = runner.forward(PagedBatch.from_step(runner.pool, step, [tokens[12:]]))
    assert_close(out[0], alone(model, tokens)[12])
    assert isinstance(manager, BlockManager)
