"""Prune and Tune: rounds, fixed zeros, what it gains, what it refuses."""

import pytest
import torch
from torch import nn

import pumice
from pumice.prune.pattern import NofM, check_n_of_m
from tiny_lm import BLOCK_LINEARS, IDS, TinyLm, assert_unchanged, state_of
from tiny_transformers import build, samples

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")

# Sequences with something to learn: each token says the next one.
SUCCESSOR = torch.randperm(50, generator=torch.Generator().manual_seed(5))


def sequences(count, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, 50, (4, 1), generator=generator) for _ in range(count)]
    for index, start in enumerate(tokens):
        rows = [start]
        for _ in range(11):
            rows.append(SUCCESSOR[rows[-1]])
        tokens[index] = torch.cat(rows, 1)
    return tokens


def loss(model, data):
    with torch.no_grad():
        return sum(
            float(nn.functional.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()))
            for x in data
        ) / len(data)


@pytest.fixture(scope="module")
def trained():
    """A model that has learned the successors."""
    model = TinyLm()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for x in sequences(150, 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        optimizer.step()
    assert loss(model, sequences(8, 2)) < 0.1
    return model.requires_grad_(False)


SHORT = {"steps": 20, "batch": 2, "learning_rate": 3e-3}


@pytest.mark.parametrize(
    "recipe",
    [
        pumice.PruneAndTune(0.9, **SHORT),
        pumice.PruneAndTune(0.9, criterion="wanda", **SHORT),
        pumice.PruneAndTune(0.9, criterion="magnitude", **SHORT),
        pumice.PruneAndTune(0.9, objective="teacher", **SHORT),
        pumice.PruneAndTune(0.9, rank=4, **{**SHORT, "learning_rate": 2e-2}),
    ],
    ids=["sparsegpt", "wanda", "magnitude", "teacher", "low rank"],
)
def test_beats_one_shot_at_high_ratios_on_text_it_was_not_tuned_on(recipe, trained):
    before = state_of(trained)
    data, unseen = sequences(16, 3), sequences(8, 4)
    once = pumice.compress(trained, pumice.SparseGPT(0.9), data)
    tuned = pumice.compress(trained, recipe, data)
    assert_unchanged(trained, before)
    assert loss(tuned, unseen) < 0.5 * loss(once, unseen)
    rows = pumice.report(tuned).layers
    assert all(row.sparsity == pytest.approx(0.9, abs=0.02) for row in rows)
    assert all(row.relative_error is not None for row in rows)
    # Only the chosen layers changed.
    for name, tensor in tuned.state_dict().items():
        if name.rpartition(".")[0] not in BLOCK_LINEARS:
            assert torch.equal(tensor, before[name])


def test_the_same_seed_gives_the_same_model_and_another_another(trained):
    data = sequences(16, 3)
    results = [
        pumice.compress(trained, pumice.PruneAndTune(0.8, rounds=2, seed=s, **SHORT), data)
        for s in (7, 7, 8)
    ]
    first, again, other = (model.blocks[0].up.weight for model in results)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_zeros_stay_zero_while_the_rest_is_trained(trained, monkeypatch):
    from pumice.prune import prune_and_tune

    original, seen = prune_and_tune.tune, []

    def watched(model, layers, *args, **kwargs):
        masks = {name: linear.weight == 0 for name, linear in layers.items()}
        weights = {name: linear.weight.detach().clone() for name, linear in layers.items()}
        losses = original(model, layers, *args, **kwargs)
        for name, linear in layers.items():
            gone = masks[name]
            assert type(linear) is nn.Linear  # no parametrization is left
            assert bool((linear.weight[gone] == 0).all())
            assert (
                float((linear.weight[~gone] != weights[name][~gone]).float().mean()) > 0.5
            )  # not dead ones
            seen.append(float(gone.float().mean()))
        assert len(losses) == 20
        return losses

    monkeypatch.setattr(prune_and_tune, "tune", watched)
    for rank in (0, 2):
        seen.clear()
        pumice.compress(
            trained, pumice.PruneAndTune(0.8, rounds=3, rank=rank, **SHORT), sequences(8, 3)
        )
        # The cubic schedule: 0.8 · (1 - (1 - t/3)³)
        expected = [0.8 * (1 - (1 - t / 3) ** 3) for t in (1, 2, 3)]
        assert seen[::4] == pytest.approx(expected, abs=0.01)


def test_patterns_are_reached_through_those_that_keep_more():
    def steps(**settings):
        recipes = pumice.PruneAndTune(**settings).steps_of_pruning()
        return [recipe.pattern or recipe.ratio for recipe in recipes]

    assert steps(pattern="2:4", rounds=4) == ["3:4", "2:4"]
    assert steps(pattern="2:4", rounds=1) == ["2:4"]
    assert steps(pattern="2:8", rounds=4) == ["5:8", "3:8", "2:8"]
    assert steps(ratio=0.7, rounds=2) == pytest.approx([0.7 * 7 / 8, 0.7])
    assert steps(ratio={"a": 0.5, "*": 0.0}, rounds=1) == [{"a": 0.5, "*": 0.0}]
    assert steps(rounds=1) == [0.5]


def test_a_pattern(trained):
    recipe = pumice.PruneAndTune(pattern="1:4", store="dense", **SHORT)
    data = sequences(16, 3)
    tuned = pumice.compress(trained, recipe, data)
    for name in BLOCK_LINEARS:
        check_n_of_m(tuned.get_submodule(name).weight, NofM(1, 4), name)
    once = pumice.compress(trained, pumice.SparseGPT(pattern="1:4", store="dense"), data)
    assert loss(tuned, sequences(8, 4)) < loss(once, sequences(8, 4))


def test_sixteen_bit_models_are_trained_in_fp32_and_come_back(trained):
    import copy

    model = copy.deepcopy(trained).to(torch.bfloat16)
    tuned = pumice.compress(model, pumice.PruneAndTune(0.8, **SHORT), sequences(8, 3))
    assert all(p.dtype == torch.bfloat16 for p in tuned.parameters())
    assert loss(tuned.float(), sequences(8, 4)) < 3.0
    assert not any(p.requires_grad for p in tuned.parameters())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.filterwarnings("error")  # of parameters that an optimizer holds twice
def test_layers_that_share_a_weight_are_trained_apart(rank):
    """As in a model whose layers were equal, but their own, from the start."""

    def model(shared):
        lm = TinyLm().requires_grad_(False)
        first, second = lm.blocks
        if shared:
            second.up.weight = first.up.weight
        else:
            second.up.weight.copy_(first.up.weight)
        return lm

    recipe = pumice.PruneAndTune(0.5, rounds=2, criterion="wanda", rank=rank, **SHORT)
    own, shared = (pumice.compress(model(s), recipe, sequences(4, 3)) for s in (False, True))
    for name, tensor in own.state_dict().items():
        assert torch.equal(shared.state_dict()[name], tensor)


def test_no_zero_has_a_sign():
    tuned = pumice.compress(TinyLm(), pumice.PruneAndTune(0.5, rank=2, **SHORT), sequences(4, 3))
    for name in BLOCK_LINEARS:
        weight = tuned.get_submodule(name).weight
        assert not bool(weight[weight == 0].signbit().any())


@pytest.mark.parametrize(
    "frozen",
    [pumice.RTN(4, 16), pumice.LLMInt8(), pumice.SparseGPT(pattern="2:4", bits=4, group_size=32)],
    ids=lambda recipe: recipe.name,
)
def test_compressed_layers_between_are_trained_through(frozen):
    """Through the gradients of pumice's own operators; they stay as they are."""
    model, data = build("llama").to(torch.bfloat16), samples(4)
    model = pumice.compress(model, frozen, data, include="*mlp*")
    before = state_of(model)
    recipe = pumice.PruneAndTune(0.5, rounds=1, criterion="wanda", **SHORT)
    tuned = pumice.compress(model, recipe, data, include="*self_attn*")
    assert_unchanged(model, before)
    for name, tensor in tuned.state_dict().items():
        if "self_attn" not in name:
            assert torch.equal(tensor, before[name])
        else:
            kept = tensor != 0
            assert float((tensor != before[name])[kept].float().mean()) > 0.5


def test_padding_is_not_learned(trained):
    """Tokens behind the mask may be anything."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = trained

        def forward(self, input_ids, attention_mask):
            return self.lm(input_ids)

    def padded(fill):
        mask = torch.ones(4, 12, dtype=torch.int64)
        mask[:, 8:] = 0
        return [
            {"input_ids": torch.where(mask == 0, fill, x), "attention_mask": mask}
            for x in sequences(8, 3)
        ]

    recipe = pumice.PruneAndTune(0.5, rounds=1, criterion="magnitude", **SHORT)
    one = pumice.compress(Masked(), recipe, padded(0), exclude="lm_head")
    two = pumice.compress(Masked(), recipe, padded(9), exclude="lm_head")
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two.state_dict()[name])


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (TinyLm(), [], "needs calibration data"),
        (nn.Sequential(nn.Linear(8, 8)), [torch.randn(4, 8)], "token ids.*objective='teacher'"),
        (TinyLm(), [IDS[0]], "token ids"),
        (TinyLm(), [IDS[:, :1]], "samples of one token have no next one"),
    ],
)
def test_what_it_cannot_tune_is_refused(model, data, message):
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        pumice.compress(model, pumice.PruneAndTune(0.5, criterion="magnitude", steps=1), data)
    assert_unchanged(model, before)


def test_it_stands_alone():
    recipes = [pumice.AWQScaling(4, 16), pumice.PruneAndTune(0.5)]
    with pytest.raises(TypeError, match="PruneAndTune does not go through the model block by"):
        pumice.compress(TinyLm(), recipes, [IDS])


def test_a_loss_that_is_not_finite_is_refused():
    model = TinyLm()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"the loss is nan at step 0 of tuning: lower learning_rate"
    ):
        pumice.compress(model, pumice.PruneAndTune(0.5, criterion="magnitude", steps=1), [IDS])


def test_a_teacher_serves_models_of_anything():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    data = [torch.randn(32, 16) for _ in range(8)]
    recipe = pumice.PruneAndTune(0.8, objective="teacher", **SHORT)
    tuned = pumice.compress(model, recipe, data)
    once = pumice.compress(model, pumice.SparseGPT(0.8), data)
    unseen = torch.randn(64, 16)

    def divergence(other):
        with torch.no_grad():
            return nn.functional.kl_div(
                other(unseen).log_softmax(-1), model(unseen).softmax(-1), reduction="batchmean"
            )

    assert divergence(tuned) < 0.7 * divergence(once)
