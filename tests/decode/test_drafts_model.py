"""Drafts by a model: what is proposed, and what becomes of the draft's own cache."""

import copy

import pytest
import torch
from sharp_models import sharp
from torch import nn

import pumice
from pumice.decode.draft import DraftRequest
from pumice.decode.draft_compressed import compressed_copy, compressed_draft
from pumice.decode.draft_early_exit import EarlyExitDraft, early_exit
from pumice.decode.draft_model import ModelDraft, draw
from pumice.decode.request import SamplingParams
from pumice.ops.sampling import sampling_probs

GREEDY = SamplingParams(max_new_tokens=64)


@pytest.fixture(scope="module")
def model():
    return sharp("llama")


def prompt(length, seed=0):
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def request(tokens, max_drafts=8, id=0, params=GREEDY, seed=None):
    return DraftRequest(id, tokens, max_drafts, params, seed)


@torch.no_grad()
def continued(model, tokens, count):
    """Greedy, the whole text through the model for every token."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-count:]


def drafts(draft, *requests):
    proposal = draft.propose(requests)
    counts = proposal.num_drafts.tolist()
    return [row[:n] for row, n in zip(proposal.tokens.tolist(), counts, strict=True)]


def used_blocks(draft):
    return draft.cache.manager.stats().used_blocks


@pytest.mark.parametrize("chunk", [1, 7, 2048])
def test_a_greedy_draft_is_the_models_own_continuation(model, chunk):
    draft = ModelDraft(model, 5, num_blocks=64, block_size=4, max_batch_tokens=chunk)
    texts = [prompt(n, seed=n) for n in (1, 9, 16, 23)]
    proposal = draft.propose([request(text, id=i) for i, text in enumerate(texts)])
    assert proposal.probs is None
    assert proposal.tokens.tolist() == [continued(model, text, 5) for text in texts]
    assert proposal.num_drafts.tolist() == [5] * 4


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen2"])
def test_other_families_draft_too(family):
    model = sharp(family)
    text = prompt(11)
    assert drafts(ModelDraft(model, 3, num_blocks=8), request(text)) == [continued(model, text, 3)]


def test_each_request_gets_as_many_as_it_can_use(model):
    draft = ModelDraft(model, 4, num_blocks=64, block_size=4)
    text = prompt(9)
    given = drafts(draft, *(request(text, n, id=n) for n in (0, 2, 9, 1)))
    expected = continued(model, text, 4)
    assert given == [[], expected[:2], expected, expected[:1]]
    assert drafts(draft) == []
    assert draft.propose([request(text, 0, id=7)]).tokens.shape == (1, 0)


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4])
def test_after_a_rejection_drafts_go_on_from_what_was_decided(model, kept):
    """The cache holds rejected drafts: they must not be seen again."""
    draft = ModelDraft(model, 4, num_blocks=64, block_size=3)
    text = prompt(10)
    for turn in range(4):
        guesses = drafts(draft, request(text))[0]
        assert guesses == continued(model, text, 4)
        # What the target chose after them; not what the draft would have.
        own = (continued(model, [*text, *guesses[:kept]], 1)[0] + 1 + turn) % 61
        text = [*text, *guesses[:kept], own]
        draft.accepted(0, 4, kept)
    assert draft.record.rate == pytest.approx(kept / (kept + (kept < 4)))
    # No more is in the cache than the text and the drafts that were run.
    assert draft.cache.manager.stats().tokens <= len(text) + 4


def test_windows_do_not_forget_what_a_rejection_brings_back():
    """Tokens leave a window as drafts push it on, and are seen again when these are rejected."""
    model = sharp("mistral")
    model.config.sliding_window = 6
    draft = ModelDraft(model, 6, num_blocks=16, block_size=2)
    assert draft.cache.runner.geometry.window_left == 5
    text = prompt(20)
    for _ in range(8):
        guesses = drafts(draft, request(text))[0]
        assert guesses == continued(model, text, 6)
        text = [*text, (guesses[0] + 1) % 61]


def test_release_returns_every_block(model):
    draft = ModelDraft(model, 4, num_blocks=64, block_size=4)
    drafts(draft, *(request(prompt(9, seed=i), id=i) for i in range(5)))
    assert used_blocks(draft) > 0
    for id in (0, 1, 2, 3, 4, 4, 77):
        draft.release(id)
    assert used_blocks(draft) == 0
    text = prompt(9, seed=1)
    assert drafts(draft, request(text, id=1)) == [continued(model, text, 4)]


def test_out_of_blocks_means_no_drafts_and_residents_stay(model):
    draft = ModelDraft(model, 4, num_blocks=8, block_size=4, prefix_cache=False)
    texts = [prompt(9, seed=i) for i in range(3)]
    expected = [continued(model, text, 4) for text in texts]
    # A sequence takes 9 + 3 tokens, three blocks: two fit, whoever comes first.
    assert drafts(draft, *(request(t, id=i) for i, t in enumerate(texts))) == [*expected[:2], []]
    assert drafts(draft, *(request(texts[i], id=i) for i in (2, 0, 1))) == [[], *expected[:2]]
    draft.release(0)
    assert drafts(draft, *(request(texts[i], id=i) for i in (2, 1))) == [expected[2], expected[1]]
    assert drafts(draft, request(prompt(200), id=9)) == [[]]
    for id in range(10):
        draft.release(id)
    assert used_blocks(draft) == 0


def test_a_sequence_that_outgrows_the_cache_gets_none_and_leaves_room(model):
    draft = ModelDraft(model, 2, num_blocks=4, block_size=4, prefix_cache=False)
    text = prompt(8)
    while len(text) <= 15:  # 15 and one draft fill 16 slots
        assert drafts(draft, request(text)) == [continued(model, text, 2)]
        text = [*text, 3]
    assert drafts(draft, request(text)) == [[]]
    assert used_blocks(draft) == 0


def test_a_pass_that_fails_leaves_the_draft_usable(model):
    class FailingError(Exception):
        pass

    draft = ModelDraft(model, 4, num_blocks=64, block_size=4, max_batch_tokens=5)
    text, other = prompt(9), prompt(12, seed=1)
    forward = draft.cache.runner.forward
    for fail_at in range(8):
        calls = 0

        def failing(batch, rows, fail_at=fail_at):
            nonlocal calls
            calls += 1
            if calls > fail_at:
                raise FailingError
            return forward(batch, rows)

        draft.cache.runner.forward = failing
        if fail_at < 4:
            with pytest.raises(FailingError):
                draft.propose([request(text, id=0), request(other, id=1)])
        draft.cache.runner.forward = forward
        expected = [continued(model, text, 4), continued(model, other, 4)]
        assert drafts(draft, request(text, id=0), request(other, id=1)) == expected
        text, other = [*text, 5], [*other, expected[1][0]]


def test_prompts_that_begin_alike_are_run_once(model):
    draft = ModelDraft(model, 2, num_blocks=64, block_size=4)
    common = prompt(32)
    drafts(draft, request([*common, 1], id=0))
    given = drafts(draft, request([*common, 2], id=1))
    assert draft.cache.manager.stats().prompt_hits == 32
    assert given == [continued(model, [*common, 2], 2)]


WARM = SamplingParams(max_new_tokens=64, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01)


@torch.no_grad()
def filtered(model, tokens, params):
    logits = model(torch.tensor([tokens])).logits[:, -1]
    return sampling_probs(
        logits,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
    )[0]


def test_probabilities_are_those_the_tokens_were_drawn_from(model):
    draft = ModelDraft(model, 3, num_blocks=64, block_size=4)
    text = prompt(9)
    params = [WARM, GREEDY, SamplingParams(max_new_tokens=9, temperature=1.5)]
    proposal = draft.propose([request(text, id=i, params=p, seed=i) for i, p in enumerate(params)])
    for row, p in enumerate(params):
        drawn = proposal.tokens[row].tolist()
        for k in range(3):
            q = filtered(model, [*text, *drawn[:k]], p)
            torch.testing.assert_close(proposal.probs[row, k], q, rtol=1e-4, atol=1e-6)
            assert q[drawn[k]] > 0
    assert proposal.tokens[1].tolist() == continued(model, text, 3)


def test_drafts_follow_their_probabilities(model):
    """A chi-square test over many draws: the chance of a false alarm is one in a million."""
    text, draws = prompt(9), 4000
    draft = ModelDraft(model, 1, num_blocks=64, block_size=16)
    q = filtered(model, text, WARM)
    counts = torch.zeros(61)
    for first in range(0, draws, 50):
        batch = [request(text, id=i, params=WARM, seed=1000 + first + i) for i in range(50)]
        drawn = draft.propose(batch).tokens[:, 0]
        counts += torch.bincount(drawn, minlength=61)
        for i in range(50):
            draft.release(i)
    possible = q > 0
    assert counts[~possible].sum() == 0
    expected = draws * q[possible]
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = int(possible.sum()) - 1
    assert freedom >= 5
    # Wilson and Hilferty's normal approximation of the chi-square distribution.
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert z < 4.75


def test_a_seed_draws_the_same_whatever_else_is_in_the_batch(model):
    text, other = prompt(9), prompt(14, seed=1)
    alone = drafts(ModelDraft(model, 6, num_blocks=64), request(text, params=WARM, seed=5))[0]
    crowd = [request(other, id=i, params=WARM, seed=i) for i in range(1, 5)]
    crowd.insert(2, request(text, id=0, params=WARM, seed=5))
    assert drafts(ModelDraft(model, 6, num_blocks=64), *crowd)[2] == alone
    others = {
        tuple(drafts(ModelDraft(model, 6, num_blocks=64), request(text, params=WARM, seed=s))[0])
        for s in range(6, 26)
    }
    assert len(others) > 10
    # Without a seed in the request that of the parameters counts, and without either, chance.
    seeded = SamplingParams(**{**vars(WARM), "seed": 5})
    assert drafts(ModelDraft(model, 6, num_blocks=64), request(text, params=seeded))[0] == alone
    unseeded = {
        tuple(drafts(ModelDraft(model, 6, num_blocks=64), request(text, params=WARM))[0])
        for _ in range(8)
    }
    assert len(unseeded) > 2


def test_a_draft_is_not_drawn_by_the_number_that_judges_it(model):
    """With the target's own uniforms a draft would be accepted or not by how it was drawn."""
    text = prompt(9)
    draft = ModelDraft(model, 1, num_blocks=512)
    batch = [request(text, id=seed, params=WARM, seed=seed) for seed in range(200)]
    drawn = draft.propose(batch).tokens[:, 0]
    q = filtered(model, text, WARM)
    theirs = draw(q.expand(200, -1), range(200), [len(text)] * 200)
    alike = (drawn == theirs).float().mean()
    assert abs(alike - (q * q).sum()) < 0.15  # by chance; 1 with the same numbers
    assert (q * q).sum() < 0.5


def test_an_early_exit_is_the_model_without_its_last_layers(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = prompt(12)
    whole = continued(model, text, 5)
    expected = copy.deepcopy(model)
    expected.model.layers = expected.model.layers[:1]
    draft = EarlyExitDraft(model, 1, 5, num_blocks=16)
    assert drafts(draft, request(text)) == [continued(expected, text, 5)]
    assert len(draft.cache.runner.pool.layers) == 1
    assert draft.num_layers == 1
    # The weights are the target's own, which is as it was.
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in draft.cache.runner.model.parameters())
    assert len(model.model.layers) == 2
    assert model.config.num_hidden_layers == 2
    assert continued(model, text, 5) == whole
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "pythia", "qwen2"])
def test_other_families_exit_early_too(family):
    model = sharp(family)
    text = prompt(8)
    exited = early_exit(model, 1)
    ids = torch.tensor([text])
    with torch.no_grad():
        assert not torch.allclose(exited(ids).logits, model(ids).logits, atol=1e-3)
    assert drafts(EarlyExitDraft(model, 1, 3, num_blocks=8), request(text)) == [
        continued(exited, text, 3)
    ]


@pytest.mark.parametrize("num_layers", [0, 2, -1])
def test_an_exit_must_leave_out_a_layer_and_keep_one(model, num_layers):
    with pytest.raises(ValueError, match=r"num_layers must be in \[1, 1\]"):
        EarlyExitDraft(model, num_layers, num_blocks=8)


def test_a_model_without_layers_has_no_exit():
    with pytest.raises(ValueError, match="no list of layers"):
        early_exit(nn.Linear(3, 3), 1)


def test_a_compressed_copy_drafts_with_a_compressed_head(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draft = compressed_draft(model, pumice.RTN(bits=8, group_size=16), 4, num_blocks=16)
    copied = draft.cache.runner.model
    assert isinstance(copied.lm_head, pumice.nn.Int4Linear)
    assert isinstance(model.lm_head, nn.Linear)
    assert copied.get_input_embeddings() is model.get_input_embeddings()
    text = prompt(12)
    assert drafts(draft, request(text)) == [continued(copied, text, 4)]
    with torch.no_grad():
        difference = copied(torch.tensor([text])).logits - model(torch.tensor([text])).logits
    assert 0 < difference.abs().mean() < 0.5 * model(torch.tensor([text])).logits.std()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_compressed_copy_is_smaller_by_default():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    copied = compressed_copy(model)
    assert {type(m) for n, m in copied.named_modules() if n.endswith(("proj", "lm_head"))} == {
        pumice.nn.Int4Linear
    }
    assert copied.lm_head.bits == 8
    assert copied.model.layers[0].mlp.up_proj.bits == 4


@pytest.mark.parametrize("wrong", [{"num_blocks": 0}, {"block_size": 0}, {"max_batch_tokens": 0}])
def test_impossible_sizes_are_refused(model, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ModelDraft(model, 4, **wrong)
