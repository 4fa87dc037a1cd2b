"""attn_implementation="pumice" against transformers' own "eager", family by family."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import masking_utils

import pumice.integrations.transformers  # noqa: F401  registers "pumice"
from decoders import DECODERS, WINDOW, build
from pumice.integrations import attention

VERSION_4 = transformers.__version__.startswith("4")


def with_pumice(model):
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("pumice")
    assert ours.config._attn_implementation == "pumice"
    return ours


@pytest.fixture(params=DECODERS)
def pair(request):
    model = build(request.param)
    return model, with_pumice(model)


@pytest.fixture
def calls(monkeypatch):
    """The operator's calls: what each passed."""
    made = []

    def spy(query, key, value, **options):
        made.append({**options, "keys": key.shape[1]})
        return attention_op(query, key, value, **options)

    attention_op = attention.flash_attention
    monkeypatch.setattr(attention, "flash_attention", spy)
    return made


def ids(batch=2, tokens=17, seed=0):
    return torch.randint(1, 61, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padding(side, tokens=17):
    mask = torch.ones(3, tokens, dtype=torch.long)
    hidden = slice(0, 5) if side == "left" else slice(-5, None)
    mask[1, hidden] = 0
    mask[2, -1 if side == "right" else 0] = 0
    return mask


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits(pair, calls):
    eager, ours = pair
    assert_close(ours(ids()).logits, eager(ids()).logits)
    assert len(calls) == 2  # every layer went through the operator
    assert all(call["causal"] for call in calls)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_sequences(pair, side):
    eager, ours = pair
    mask = padding(side)
    real = mask.bool()
    out = ours(ids(3), attention_mask=mask).logits
    assert_close(out[real], eager(ids(3), attention_mask=mask).logits[real])
    assert out.isfinite().all()  # rows of padding see nothing


@torch.no_grad()
def test_generation_with_a_cache(pair):
    eager, ours = pair
    mask = padding("left")
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    arguments |= {"pad_token_id": 0, "eos_token_id": None}
    theirs = eager.generate(ids(3), **arguments)
    assert torch.equal(ours.generate(ids(3), **arguments), theirs)
    assert theirs.shape == (3, 29)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral, window", "gpt-oss, sinks"])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_a_static_cache(name, padded):
    """It is longer than what was written into it."""
    eager = build(name)
    ours = with_pumice(eager)
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    arguments |= {"cache_implementation": "static", "disable_compile": True}
    if padded:
        arguments["attention_mask"] = padding("left")
    assert torch.equal(ours.generate(ids(3), **arguments), eager.generate(ids(3), **arguments))


@torch.no_grad()
def test_a_prompt_in_parts(pair):
    """Several queries at once behind a filled cache: S_q < S_k, neither of them 1."""
    eager, ours = pair
    outputs = []
    for model in (eager, ours):
        first = model(ids(tokens=9), use_cache=True)
        second = model(ids(tokens=4, seed=1), past_key_values=first.past_key_values)
        outputs.append(second.logits)
    assert_close(outputs[1], outputs[0])


def test_a_training_step(pair):
    eager, ours = pair
    mask = padding("right")
    labels = ids(3).masked_fill(mask == 0, -100)
    losses = []
    for model in (eager, ours):
        model.train()
        loss = model(ids(3), attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    assert_close(losses[1], losses[0])
    theirs = dict(eager.named_parameters())
    moved = 0
    for name, parameter in ours.named_parameters():
        wanted = theirs[name].grad
        if wanted is None:
            assert parameter.grad is None
            continue
        torch.testing.assert_close(
            parameter.grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max() + 1)
        )
        moved += bool(wanted.any())
    assert moved > 10


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_sequences_packed_into_one_row(name):
    """transformers finds them by their positions, and hides one from the other."""
    eager = build(name)
    ours = with_pumice(eager)
    positions = torch.cat([torch.arange(n) for n in (9, 4, 4)])[None]
    packed = ours(ids(1), position_ids=positions, use_cache=False).logits
    assert_close(packed, eager(ids(1), position_ids=positions, use_cache=False).logits)
    alone = ours(ids(1)[:, 9:13]).logits
    assert_close(packed[:, 9:13], alone)


@torch.no_grad()
@pytest.mark.parametrize("form", ["bool", "float"])
def test_a_mask_of_ones_own(form, calls):
    eager = build("llama")
    ours = with_pumice(eager)
    seen = torch.rand(2, 1, 17, 17, generator=torch.Generator().manual_seed(3)) < 0.5
    seen |= torch.eye(17, dtype=torch.bool)
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    given = seen if form == "bool" else additive
    assert_close(
        ours(ids(), attention_mask=given).logits, eager(ids(), attention_mask=additive).logits
    )
    assert not any(call["causal"] for call in calls)


@torch.no_grad()
@pytest.mark.skipif(VERSION_4, reason="transformers 5 gave encoders the interface")
def test_encoders():
    """Masks in both directions, with and without a window; cross attention of other lengths."""
    small = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 56}
    bert = transformers.BertConfig(**small, num_hidden_layers=2, num_attention_heads=4)
    modern = transformers.ModernBertConfig(
        **small,
        num_hidden_layers=3,
        num_attention_heads=4,
        local_attention=8,
        **{f"{kind}_token_id": 1 for kind in ("pad", "bos", "eos", "cls", "sep")},
    )
    bart = transformers.BartConfig(
        vocab_size=61,
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=56,
        decoder_ffn_dim=56,
        dropout=0.0,
    )
    for config in (bert, modern, bart):
        torch.manual_seed(0)
        eager = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
        ours = with_pumice(eager)
        for side in ("left", "right"):
            mask = padding(side)
            arguments = {"input_ids": ids(3), "attention_mask": mask}
            if config is bart:
                arguments["decoder_input_ids"] = ids(3, 6)
            real = slice(None) if config is bart else mask.bool()
            assert_close(
                ours(**arguments).last_hidden_state[real],
                eager(**arguments).last_hidden_state[real],
            )
            del arguments["attention_mask"]
            assert_close(ours(**arguments).last_hidden_state, eager(**arguments).last_hidden_state)


def test_from_pretrained(tmp_path, calls):
    build("llama").save_pretrained(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", attn_implementation="pumice"
    )
    assert model.config._attn_implementation == "pumice"
    model(ids())
    assert len(calls) == 2


@torch.no_grad()
def test_autocast_and_16_bit():
    eager = build("llama")
    ours = with_pumice(eager)
    exact = eager(ids()).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(ids()).logits
        reference = eager(ids()).logits
    assert (out - exact).norm() < 1.5 * (reference - exact).norm()
    halved = ours.to(torch.bfloat16)(ids()).logits
    assert (halved - exact).norm() < 0.1 * exact.norm()


@torch.no_grad()
@pytest.mark.skipif(VERSION_4, reason="transformers 4 does not compile as one graph")
def test_compiles_as_one_graph():
    torch._dynamo.reset()
    ours = with_pumice(build("mistral, window"))
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (17, 12):
        given = {"input_ids": ids(tokens=tokens), "use_cache": False}
        assert_close(compiled(**given).logits, ours(**given).logits)


# ---- the mask that the layers share


def mask_of(function=masking_utils.causal_mask_function, queries=17, keys=17, padded=None, **more):
    options = {"q_offset": keys - queries, "kv_offset": 0, "attention_mask": padded, **more}
    if VERSION_4:
        start = options.pop("q_offset")
        options["cache_position"] = torch.arange(start, start + queries)
    else:
        options["q_length"] = queries
    return attention.attention_mask(batch_size=3, kv_length=keys, mask_function=function, **options)


SLIDING = masking_utils.sliding_window_causal_mask_function(WINDOW)


def bytes_of(mask):
    return mask.untyped_storage().nbytes()


def test_what_an_operator_can_say_itself_needs_no_mask():
    assert mask_of() is None
    assert mask_of(queries=1) is None
    assert mask_of(queries=4) is None
    assert mask_of(padded=torch.ones(3, 17, dtype=torch.bool)) is None
    assert mask_of(SLIDING, queries=WINDOW, keys=WINDOW) is None
    if not VERSION_4:
        assert mask_of(masking_utils.bidirectional_mask_function) is None


def test_a_window_is_told_without_a_matrix():
    mask = mask_of(SLIDING)
    assert mask.shape == (3, WINDOW, 17)
    assert mask.all()
    assert bytes_of(mask) == 17
    # What a model passes back in is taken as it is.
    assert mask_of(SLIDING, padded=mask) is mask


def test_padding_is_a_mask_of_keys():
    padded = padding("left").bool()
    assert torch.equal(mask_of(padded=padded), padded)
    mask = mask_of(SLIDING, padded=padded)
    assert mask.shape == (3, WINDOW, 17)
    assert torch.equal(mask[:, 0], padded)
    assert bytes_of(mask) <= bytes_of(padded)
    if VERSION_4:
        return
    both = mask_of(masking_utils.bidirectional_mask_function, padded=padded)
    assert both.shape == (3, 1, 17, 17)
    assert bytes_of(both) <= bytes_of(padded)


def test_a_cache_that_is_not_full_is_cut():
    mask = mask_of(queries=4, keys=32, q_offset=6)
    assert mask.shape == (3, 10)
    assert mask.all()


def test_an_unknown_pattern_is_made_element_by_element():
    function = masking_utils.and_masks(
        lambda b, h, i, j: (i - j) % 2 == 0, masking_utils.causal_mask_function
    )
    mask = mask_of(function)
    i, j = torch.arange(17)[:, None], torch.arange(17)
    assert torch.equal(mask[1, 0], ((i - j) % 2 == 0) & (j <= i))


# ---- refused


def test_refused():
    model = with_pumice(build("llama"))
    with pytest.raises(NotImplementedError, match=r"output_attentions is given.*'eager'"):
        attention.attention_forward(
            model, *torch.zeros(3, 1, 4, 5, 8), None, output_attentions=True
        )
    with pytest.raises(NotImplementedError, match="a bias on the scores is not supported"):
        attention.attention_forward(
            model, *torch.zeros(3, 1, 4, 5, 8), None, position_bias=torch.zeros(1, 4, 5, 5)
        )
    with pytest.raises(ValueError, match=r"other values than 0 and -inf"):
        model(ids(), attention_mask=torch.full((2, 1, 17, 17), -0.5))
    with pytest.raises(ValueError, match=r"must be bool, or float.*int64"):
        model(ids(), attention_mask=torch.ones(2, 1, 17, 17, dtype=torch.long))


def test_dropout_is_refused_in_training():
    model = build("llama")
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    ours = with_pumice(model)
    ours(ids())  # evaluation has none
    with pytest.raises(NotImplementedError, match=r"dropout = 0\.1.*attention_dropout"):
        ours.train()(ids())
