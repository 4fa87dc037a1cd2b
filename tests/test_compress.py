"""compress: which layers, what it leaves, what it reports, and what happens when it fails."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import pumice
from pumice.nn import Int8Linear, Int8MixedLinear
from tiny_lm import BLOCK_LINEARS, IDS, TinyLm, assert_unchanged, compressed, state_of, types


def test_linear_layers_are_replaced_and_the_rest_is_left():
    model = TinyLm()
    result = pumice.compress(model, pumice.LLMInt8(threshold=5.0))
    assert compressed(result) == BLOCK_LINEARS
    assert type(result.lm_head) is nn.Linear
    assert result.blocks[0].up.threshold == 5.0
    y, exact = result(IDS), model(IDS)
    assert (y - exact).norm() < 0.02 * exact.norm()
    assert not torch.equal(y, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("recipe", [pumice.LLMInt8(), pumice.Int8()], ids=lambda r: r.name)
def test_every_activation_dtype(dtype, recipe):
    model = TinyLm().to(dtype)
    result = pumice.compress(model, recipe)
    y, exact = result(IDS), model(IDS)
    assert y.dtype == dtype
    assert (y - exact).float().norm() < 0.03 * exact.float().norm()


def test_not_inplace_leaves_the_original_and_shares_nothing():
    model = TinyLm()
    before = state_of(model)
    result = pumice.compress(model, pumice.LLMInt8())
    with torch.no_grad():
        for tensor in [*result.parameters(), *result.buffers()]:
            tensor.zero_()
    assert_unchanged(model, before)
    assert all(kind is nn.Linear for kind in types(model).values())


def test_not_inplace_never_copies_a_weight_that_is_replaced(monkeypatch):
    model = TinyLm()
    replaced = {id(model.get_submodule(name).weight) for name in BLOCK_LINEARS}
    copied = []
    original = nn.Parameter.__deepcopy__

    def spy(self, memo):
        copied.append(id(self))
        return original(self, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", spy)
    pumice.compress(model, pumice.LLMInt8())
    assert id(model.lm_head.weight) in copied
    assert not replaced & set(copied)


def test_inplace_changes_the_model_itself_and_frees_the_weights():
    model = TinyLm()
    expected = pumice.compress(model, pumice.LLMInt8())(IDS)
    weight = weakref.ref(model.blocks[0].up.weight)
    head = model.lm_head.weight
    result = pumice.compress(model, pumice.LLMInt8(), inplace=True)
    assert result is model
    assert model.lm_head.weight is head
    assert torch.equal(model(IDS), expected)
    gc.collect()
    assert weight() is None


def test_a_bare_linear_is_returned_replaced():
    linear = nn.Linear(12, 5)
    for inplace in (False, True):
        result = pumice.compress(linear, pumice.Int8(), inplace=inplace)
        assert type(result) is Int8Linear
        assert "(the model)" in str(pumice.report(result))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"include": "*.up"}, ["blocks.0.up", "blocks.1.up"]),
        ({"include": ["up"]}, ["blocks.0.up", "blocks.1.up"]),
        ({"include": ["blocks.1.*"]}, ["blocks.1.up", "blocks.1.down"]),
        ({"exclude": ["down", "lm_head"]}, ["blocks.0.up", "blocks.1.up"]),
        ({"exclude": ()}, [*BLOCK_LINEARS, "lm_head"]),
        ({"include": "lm_head", "exclude": ()}, ["lm_head"]),
        ({"include": lambda name, module: module.bias is None}, BLOCK_LINEARS[1::2]),
        ({"exclude": lambda name, module: "blocks.0" in name}, [*BLOCK_LINEARS[2:], "lm_head"]),
    ],
)
def test_include_and_exclude(arguments, expected):
    result = pumice.compress(TinyLm(), pumice.LLMInt8(), **arguments)
    assert compressed(result) == expected


def test_a_weight_tied_to_an_embedding_is_never_compressed():
    model = TinyLm(tied=True)
    result = pumice.compress(model, pumice.LLMInt8(), exclude=())
    assert type(result.lm_head) is nn.Linear
    assert result.lm_head.weight is result.embed.weight
    assert pumice.report(result).skipped == {"lm_head": "its weight is tied to another module"}


def test_a_layer_in_two_places_stays_one_layer():
    shared = nn.Linear(8, 8)
    for inplace in (False, True):
        model = nn.Sequential(shared, nn.ReLU(), shared)
        result = pumice.compress(model, pumice.LLMInt8(), inplace=inplace)
        assert type(result[0]) is Int8MixedLinear
        assert result[0] is result[2]
        assert len(pumice.report(result).layers) == 1


def test_layers_that_are_not_called_as_linears_are_left_with_the_reason():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "doubled": Doubled(8, 8),
            "normed": nn.utils.weight_norm(nn.Linear(8, 8)),
            "orthogonal": nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)),
            "lazy": nn.LazyLinear(8),
            "fp64": nn.Linear(8, 8, dtype=torch.float64),
        }
    )
    model["patched"] = nn.Linear(8, 8)
    model["patched"].forward = lambda x: x
    report = pumice.report(pumice.compress(model, pumice.LLMInt8(), inplace=True))
    assert [layer.name for layer in report.layers] == ["plain"]
    reasons = {
        "attention.out_proj": "MultiheadAttention",
        "doubled": "forward",
        "normed": "parametrization",
        "orthogonal": "parametrization",
        "lazy": "not yet initialized",
        "fp64": "float64",
        "patched": "forward",
    }
    assert report.skipped.keys() == reasons.keys()
    for name, words in reasons.items():
        assert words in report.skipped[name]


@pytest.mark.parametrize("enable_nested_tensor", [True, False])
def test_torchs_fused_encoder_layer_runs_the_replacements(enable_nested_tensor):
    """In evaluation torch reads linear1.weight itself; the fused path must be left."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=enable_nested_tensor).eval()
    x = torch.randn(3, 5, 16)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        exact = model(x, src_key_padding_mask=padding)
        result = pumice.compress(model, pumice.LLMInt8())
        calls = []
        result.layers[1].linear2.register_forward_hook(lambda *_: calls.append(1))
        y = result(x, src_key_padding_mask=padding)
        assert torch.equal(model(x, src_key_padding_mask=padding), exact)
    assert calls
    kept = ~padding
    assert (y - exact)[kept].norm() < 0.02 * exact[kept].norm()


def test_mode_and_hooks_are_kept():
    model = TinyLm().eval()
    model.blocks[0].up.train()
    seen = []
    model.blocks[0].up.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    result = pumice.compress(model, pumice.LLMInt8())
    assert result.blocks[0].up.training
    assert not result.blocks[1].up.training
    result(IDS)
    assert seen == [Int8MixedLinear]


def test_bias_keeps_requiring_a_gradient_or_not():
    model = TinyLm()
    model.blocks[0].up.bias.requires_grad_(False)
    result = pumice.compress(model, pumice.LLMInt8())
    assert not result.blocks[0].up.bias.requires_grad
    assert result.blocks[1].up.bias.requires_grad


def test_copies_and_casts_of_a_compressed_model():
    model = pumice.compress(TinyLm(), pumice.LLMInt8())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), model(IDS))
    assert pumice.report(twin) == pumice.report(model)
    half = twin.bfloat16()
    assert half(IDS).dtype == torch.bfloat16
    assert half.blocks[0].up.weight_scale.dtype == torch.float32


# ---- failures


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (nn.Sequential(nn.Conv1d(2, 2, 1)), {}, "Sequential holds no nn.Linear"),
        (nn.Sequential(), {}, "Sequential holds no nn.Linear"),
        (TinyLm(), {"include": "*.q_proj"}, r"include='\*\.q_proj' matches none"),
        (TinyLm(), {"include": ["q", "k"]}, r"include=\['q', 'k'\] matches none"),
        (TinyLm(), {"include": "lm_head"}, "lm_head: excluded"),
        (TinyLm(), {"exclude": "*"}, "blocks.0.up: excluded.*lm_head: excluded"),
        (TinyLm().double(), {}, "blocks.0.up: its weight is torch.float64"),
        (TinyLm(), {"calibration": []}, "calibration is empty"),
    ],
)
def test_nothing_to_do_says_why(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        pumice.compress(model, pumice.LLMInt8(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", pumice.LLMInt8()), "model must be an nn.Module, not str"),
        ((TinyLm(), "llm_int8"), "recipe must be a pumice recipe.*'llm_int8'.*make_recipe"),
        ((TinyLm(), pumice.LLMInt8), "recipe must be a pumice recipe"),
        ((TinyLm(), pumice.LLMInt8(), IDS), "calibration must be an iterable.*not one Tensor"),
        (
            (TinyLm(), pumice.LLMInt8(), {"ids": IDS}),
            "calibration must be an iterable.*not one dict",
        ),
        ((TinyLm(), pumice.LLMInt8(), [3]), "calibration must yield tensors.*not int"),
    ],
)
def test_wrong_types_are_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        pumice.compress(*arguments)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_bad_weight_names_its_layer_and_leaves_the_model(inplace):
    model = TinyLm()
    with torch.no_grad():
        model.blocks[1].down.weight[3, 0] = float("nan")
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"layer 'blocks\.1\.down'.*NaN or infinite.*rows 3"):
        pumice.compress(model, pumice.LLMInt8(), inplace=inplace)
    assert dict(model.named_modules()) == modules


def test_a_failing_calibration_leaves_the_model():
    model = TinyLm().train()
    modules = dict(model.named_modules())

    def inputs():
        yield IDS
        raise RuntimeError("the data ran out")

    with pytest.raises(RuntimeError, match="the data ran out"):
        pumice.compress(model, pumice.LLMInt8(), inputs(), inplace=True)
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


# ---- compiled and exported


def test_a_compressed_model_compiles_as_one_graph():
    model = pumice.compress(TinyLm(), pumice.LLMInt8()).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (IDS, IDS[:, :3], IDS[:1]):
            torch.testing.assert_close(compiled(ids), model(ids))


def test_a_compressed_model_exports():
    model = pumice.compress(TinyLm(), pumice.LLMInt8()).eval()
    batch, tokens = torch.export.Dim("batch", max=64), torch.export.Dim("tokens", max=512)
    exported = torch.export.export(model, (IDS,), dynamic_shapes=({0: batch, 1: tokens},))
    ids = torch.randint(0, 50, (3, 11))
    torch.testing.assert_close(exported.module()(ids), model(ids))


def test_fine_tuning_on_top_of_frozen_weights():
    """Embedding, norms and head learn a fixed sequence through the int8 layers."""
    model = pumice.compress(TinyLm(), pumice.LLMInt8())
    frozen = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(60):
        logits = model(IDS[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, frozen[name])
