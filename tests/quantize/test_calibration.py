"""The calibration engine: what layers are given, one block after the other, and what goes wrong."""

import warnings

import pytest
import torch
from torch import nn

import pumice
from pumice.calibration import Block, Hessian, Stage, find_stack
from pumice.nn import Int4Linear
from pumice.quantize.gptq import GPTQStage
from tiny_lm import BLOCK_LINEARS, IDS, TinyLm, assert_unchanged, compressed, state_of, types
from tiny_transformers import build, samples

FAMILIES = ["llama", "qwen2", "mistral", "gemma", "opt", "pythia"]

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


def spy_on_hessians(monkeypatch):
    """The Hessians that GPTQ collects, by qualified name."""
    seen = {}
    original = Block.collect

    def collect(self, make):
        groups = original(self, make)
        for group in groups:
            for name in group.names:
                seen[self.full_name(name)] = (group.names, group.statistic.value.clone())
        return groups

    monkeypatch.setattr(Block, "collect", collect)
    return seen


def inputs_of(model, name, data):
    caught = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: caught.append(args[0].detach())
    )
    with torch.no_grad():
        for sample in data:
            model(**sample) if isinstance(sample, dict) else model(sample)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in caught])


def dense_copy(model):
    """The model with its compressed layers as nn.Linear of the same weights."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Int4Linear):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            with torch.no_grad():
                linear.weight.copy_(layer.dequantize())
                if layer.bias is not None:
                    linear.bias.copy_(layer.bias)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_see_what_the_compressed_blocks_before_them_give(family, monkeypatch):
    seen = spy_on_hessians(monkeypatch)
    model, data = build(family), samples()
    before = state_of(model)
    use_cache = model.config.use_cache
    result = dense_copy(pumice.compress(model, pumice.GPTQ(4, 32), data))
    assert_unchanged(model, before)
    assert model.config.use_cache == use_cache
    assert not any("forward" in vars(module) for module in model.modules())
    stack = find_stack(model)
    assert len(stack.blocks) == 2
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    inside = [n for n in linears if n.startswith(stack.name)]
    assert seen.keys() == set(inside)
    # The first layers of the second block: their inputs come from the first as it was compressed.
    second = list(stack.blocks)[1]
    first_layers = next(names for full, (names, _) in seen.items() if full.startswith(second))
    name = f"{second}.{first_layers[0]}"
    x = inputs_of(result, name, data)
    torch.testing.assert_close(seen[name][1], 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "recipe",
    [
        pumice.GPTQ(4, 32, static_groups=False, symmetric=False),
        [pumice.AWQScaling(4, 32, grid=8), pumice.GPTQ(4, 32, symmetric=False)],
    ],
    ids=["gptq-perm", "awq-gptq"],
)
def test_every_family_is_compressed_and_better_than_by_rounding(family, recipe):
    model, data = build(family), samples()
    symmetric = getattr(recipe, "symmetric", False)
    result = pumice.compress(model, recipe, data)
    nearest = pumice.compress(model, pumice.RTN(4, 32, symmetric=symmetric), data)
    kinds = types(result)
    inside = [n for n in kinds if n.startswith(find_stack(model).name)]
    assert all(kinds[n] is Int4Linear for n in inside)
    with torch.no_grad():
        exact = torch.cat([model(x).logits for x in data])
        y = torch.cat([result(x).logits for x in data])
        rounded = torch.cat([nearest(x).logits for x in data])
    assert (y - exact).norm() < (rounded - exact).norm()
    errors = [layer.relative_error for layer in pumice.report(result).layers]
    assert all(0 < error < 0.3 for error in errors)


def test_gpt2s_own_layer_is_refused_with_its_name():
    with pytest.raises(ValueError, match=r"Conv1D.*is no nn\.Linear and is not compressed"):
        pumice.compress(build("gpt2"), pumice.GPTQ(), samples())


def test_layers_of_one_input_share_a_hessian(monkeypatch):
    seen = spy_on_hessians(monkeypatch)
    pumice.compress(build("llama"), pumice.GPTQ(4, 32), samples())
    names = {group for group, _ in seen.values()}
    assert names == {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    }


def test_padding_does_not_count(monkeypatch):
    seen = spy_on_hessians(monkeypatch)
    model = build("llama")
    data = samples(2)
    padded = []
    for ids in data:
        mask = torch.ones(2, 24 + 8, dtype=torch.int64)
        mask[:, 24:] = 0
        ids = torch.cat([ids, torch.zeros(2, 8, dtype=torch.int64)], 1)
        padded.append({"input_ids": ids, "attention_mask": mask})
    name = "model.layers.0.mlp.up_proj"
    pumice.compress(model, pumice.GPTQ(4, 32), padded)
    with_padding = seen[name][1]
    pumice.compress(model, pumice.GPTQ(4, 32), data)
    torch.testing.assert_close(with_padding, seen[name][1], rtol=1e-4, atol=1e-5)


def test_offload_and_an_explicit_device_change_nothing():
    model, data = build("llama"), samples()
    expected = pumice.compress(model, pumice.GPTQ(4, 32), data).state_dict()
    other = pumice.compress(model, pumice.GPTQ(4, 32), data, offload=True, device="cpu")
    assert all(torch.equal(expected[k], v) for k, v in other.state_dict().items())


def test_chosen_layers_outside_of_the_blocks_are_rounded_to_nearest():
    model = TinyLm()
    result = pumice.compress(model, pumice.GPTQ(4, 16), [IDS] * 8, exclude=())
    assert compressed(result) == [*BLOCK_LINEARS, "lm_head"]
    nearest = pumice.RTN(4, 16).compress_linear(model.lm_head)
    assert torch.equal(result.lm_head.qweight, nearest.qweight)


def test_only_chosen_layers_are_touched_and_only_needed_blocks_run():
    model, data = build("llama"), samples()
    calls = []
    model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    result = pumice.compress(model, pumice.GPTQ(4, 32), data, include="*layers.0*o_proj")
    assert compressed(result) == ["model.layers.0.self_attn.o_proj"]
    assert not calls  # never beyond the last block


def test_progress_and_report():
    seen = []
    model = build("llama")
    result = pumice.compress(
        model, pumice.AWQ(3, 32, grid=3), samples(), progress=lambda *args: seen.append(args)
    )
    assert [done for done, _, _ in seen] == list(range(1, 15))
    assert {total for _, total, _ in seen} == {14}
    report = pumice.report(result)
    assert [name for _, _, name in seen] == [layer.name for layer in report.layers]
    assert report.recipes == [pumice.AWQ(3, 32, grid=3).to_dict()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model, data = build("llama").to(dtype), samples(2)
    for recipe in (pumice.GPTQ(4, 32), pumice.AWQ(4, 32, grid=3)):
        result = pumice.compress(model, recipe, data)
        with torch.no_grad():
            y, exact = result(data[0]).logits, model(data[0]).logits
        assert y.dtype == dtype
        assert (y - exact).float().norm() < 0.3 * exact.float().norm()


def test_mode_and_gradient_flags_are_kept():
    model = build("llama").train()
    model.model.layers[1].eval()
    model.model.layers[0].input_layernorm.weight.requires_grad_(False)
    result = pumice.compress(model, pumice.AWQ(4, 32, grid=3), samples(2))
    for name, module in model.named_modules():
        assert result.get_submodule(name).training == module.training
    for name, parameter in result.named_parameters():
        assert parameter.requires_grad == model.get_parameter(name).requires_grad


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x):
        x += self.up(x)
        return x


def test_a_block_may_write_into_its_input(monkeypatch):
    seen = spy_on_hessians(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(InPlace(), InPlace())
    x = torch.randn(50, 16)
    pumice.compress(model, pumice.GPTQ(4, 16), [x.clone()])
    torch.testing.assert_close(seen["0.up"][1], 2 / 50 * x.T @ x)


# ---- finding the blocks


def test_the_largest_stack_is_found():
    model = nn.ModuleDict(
        {
            "small": nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8) for _ in range(3)),
            "large": nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2)),
            "heads": nn.ModuleList(nn.Linear(8, 8) for _ in range(9)),
            "mixed": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        }
    )
    assert find_stack(model).name == "large"
    assert list(find_stack(model, "small").blocks) == ["small.0", "small.1", "small.2"]
    assert find_stack(model, "").is_whole_model
    for wrong in ("heads", "mixed", "large.0", "nowhere"):
        with pytest.raises(ValueError, match=wrong):
            find_stack(model, wrong)


def test_a_block_standing_twice_is_no_stack():
    block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    assert find_stack(nn.Sequential(block, block)).is_whole_model


def test_models_without_blocks_are_one_block():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    data = [torch.randn(64, 32) * torch.linspace(0.1, 4, 32) for _ in range(3)]
    for model in (mlp, nn.Linear(32, 8)):
        results = {}
        for recipe in (pumice.RTN(3, 16), pumice.GPTQ(3, 16)):
            result = pumice.compress(model, recipe, data)
            with torch.no_grad():
                results[recipe.name] = sum((result(x) - model(x)).norm() for x in data)
        assert results["gptq"] < results["rtn"]


class Skipping(TinyLm):
    def forward(self, ids):
        x = self.embed(ids)
        x = self.blocks[0](x)
        return self.lm_head(self.blocks[1](x * 2))


def test_what_happens_between_blocks_is_noticed():
    model = Skipping()
    with pytest.raises(
        ValueError, match=r"changes the activations before block 'blocks.1'.*as a w"
    ):
        pumice.compress(model, pumice.GPTQ(4, 16), [IDS] * 8)
    assert not any("forward" in vars(module) for module in model.modules())
    result = pumice.compress(model, pumice.GPTQ(4, 16), [IDS] * 8, blocks="")
    assert compressed(result) == BLOCK_LINEARS


class Early(TinyLm):
    def forward(self, ids):
        return self.lm_head(self.blocks[0](self.embed(ids)))


def test_blocks_that_do_not_run_are_noticed():
    with pytest.raises(ValueError, match="does not call all of the blocks 'blocks'"):
        pumice.compress(Early(), pumice.GPTQ(4, 16), [IDS] * 8)


# ---- bad calibration


class Experts(nn.Module):
    """Of which the second is chosen for no row: not called at all, or with none."""

    def __init__(self, calls_all):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.calls_all = calls_all

    def forward(self, x):
        a = x[:, 0] < 1e9
        y = self.a(x[a])
        if self.calls_all or not bool(a.all()):
            y = torch.cat((y, self.b(x[~a])))
        return x + y


@pytest.mark.parametrize("calls_all", [False, True], ids=["not called", "called with no rows"])
def test_a_layer_that_is_never_reached_is_named(calls_all):
    model = nn.Sequential(Experts(calls_all), Experts(calls_all))
    for recipe in (
        pumice.GPTQ(4, 16),
        pumice.AWQ(4, 16, grid=3),
        pumice.Wanda(0.5),
        pumice.SparseGPT(0.5),
    ):
        with pytest.raises(ValueError, match=r"layer '0\.b' received no calibration data"):
            pumice.compress(model, recipe, [torch.randn(40, 16)])


def test_a_dead_layer_is_named():
    model = TinyLm()
    with torch.no_grad():
        model.blocks[1].up.bias.fill_(-1e6)  # the ReLU behind it gives zeros
    with pytest.raises(ValueError, match=r"layer 'blocks\.1\.down' is dead"):
        pumice.compress(model, pumice.GPTQ(4, 16), [IDS] * 8)


@pytest.mark.parametrize("recipe", [pumice.GPTQ(4, 16), pumice.AWQ(4, 16, grid=3)])
def test_nan_in_calibration_is_named(recipe):
    model = TinyLm()
    with torch.no_grad():
        model.embed.weight[3] = float("nan")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"layer 'blocks\.0\.up'.*NaN or infinite"):
        pumice.compress(model, recipe, [IDS] * 8)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) or k == "embed.weight" for k, v in before.items())


def test_weights_with_nan_are_named():
    model = TinyLm()
    with torch.no_grad():
        model.blocks[0].down.weight[2, 3] = float("inf")
    for recipe in (pumice.RTN(4, 16), pumice.GPTQ(4, 16)):
        with pytest.raises(ValueError, match=r"layer 'blocks\.0\.down': .*rows 2"):
            pumice.compress(model, recipe, [IDS] * 8 if recipe.name == "gptq" else None)


@pytest.mark.parametrize("recipe", [pumice.GPTQ(4, 16), pumice.SparseGPT(bits=4, group_size=16)])
def test_little_data_works_and_warns_once(recipe):
    with pytest.warns(UserWarning, match="calibration tokens") as caught:
        result = pumice.compress(TinyLm(), recipe, [IDS[:1, :2]])
    assert compressed(result) == BLOCK_LINEARS
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(f"{type(recipe).__name__}: 2 calibration tokens")
    assert "few for the 24 inputs of blocks.0.up" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pumice.compress(TinyLm(), recipe, [IDS] * 21)  # 294 tokens, 72 features


@pytest.mark.parametrize(
    ("recipe", "calibration", "message"),
    [
        (pumice.GPTQ(), None, "GPTQ needs calibration data"),
        ([pumice.AWQScaling(), pumice.GPTQ()], None, "AWQScaling and GPTQ needs calibration data"),
        (pumice.GPTQ(), [], "calibration is empty"),
        (pumice.AWQScaling(), [IDS], r"only prepares.*\[AWQScaling\(…\), pumice.GPTQ\(…\)\]"),
        ([pumice.GPTQ(), pumice.RTN()], [IDS], "nothing can follow it"),
    ],
)
def test_recipes_and_calibration_that_do_not_go_together(recipe, calibration, message):
    with pytest.raises(ValueError, match=message):
        pumice.compress(TinyLm(), recipe, calibration)


def test_lists_take_only_recipes_with_stages():
    with pytest.raises(TypeError, match="Int8 does not go through the model block by block"):
        pumice.compress(TinyLm(), [pumice.AWQScaling(), pumice.Int8()], [IDS])
    with pytest.raises(TypeError, match="recipe must be a pumice recipe"):
        pumice.compress(TinyLm(), [pumice.GPTQ(), "int8"], [IDS])
    with pytest.raises(TypeError, match="recipe must be a pumice recipe"):
        pumice.compress(TinyLm(), [], [IDS])


def test_a_stage_that_leaves_a_layer_is_found_out(monkeypatch):
    monkeypatch.setattr(GPTQStage, "process", lambda self, block: None)
    with pytest.raises(RuntimeError, match=r"no stage has compressed blocks\.0\.up"):
        pumice.compress(TinyLm(), pumice.GPTQ(4, 16), [IDS])


def test_public_names():
    assert issubclass(GPTQStage, Stage)
    assert Hessian(4, torch.device("cpu")).tokens == 0
