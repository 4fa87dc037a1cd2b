"""AWQ: which modules take the scales, and both searches against brute force."""

import pytest
import torch
from torch import nn

import pumice
from pumice.calibration import Block, DiagonalBlocks, MeanAbs
from pumice.calibration.inputs import capture
from pumice.calibration.stack import find_stack
from pumice.quantize.awq_stages import ClipStage, ScaleStage, clip, scale_of
from pumice.quantize.fold import FoldFinder
from pumice.quantize.grid import Grid
from tiny_lm import state_of
from tiny_transformers import build, samples

CPU = torch.device("cpu")

LLAMA = {
    "self_attn.q_proj": ("input_layernorm", "norm"),
    "self_attn.o_proj": ("self_attn.v_proj", "linear"),
    "mlp.gate_proj": ("post_attention_layernorm", "norm"),
    "mlp.down_proj": ("mlp.up_proj", "linear"),
}
EXPECTED = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "mistral": LLAMA,
    "gemma": {
        **LLAMA,
        "self_attn.q_proj": ("input_layernorm", "unit norm"),
        "mlp.gate_proj": ("post_attention_layernorm", "unit norm"),
    },
    "opt": {
        "self_attn.k_proj": ("self_attn_layer_norm", "norm"),
        "self_attn.out_proj": ("self_attn.v_proj", "linear"),
        "fc1": ("final_layer_norm", "norm"),
        "fc2": ("fc1", "linear"),  # a ReLU lets positive scales pass
    },
    "pythia": {
        "attention.query_key_value": ("input_layernorm", "norm"),
        "attention.dense": None,  # queries, keys and values are rows of one layer
        "mlp.dense_h_to_4h": ("post_attention_layernorm", "norm"),
        "mlp.dense_4h_to_h": None,  # a GELU does not
    },
}


def first_block(model, data):
    stack = find_stack(model)
    inputs = capture(model, stack, data, None)
    name, module = next(iter(stack.blocks.items()))
    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    return Block(name, 0, module, layers, inputs, CPU)


@pytest.mark.parametrize("family", EXPECTED)
def test_folds_are_found_in_every_family_and_change_nothing(family):
    model, data = build(family), samples(1)
    with torch.no_grad():
        block = first_block(model, data)
        before = state_of(model)
        exact = model(data[0]).logits
        finder = FoldFinder()
        groups = {
            group.names: finder.find(block, group.names)
            for group in block.collect(lambda _, m: MeanAbs(m.in_features, CPU))
        }
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        found = {
            names[0]: None if fold is None else (fold.producer, fold.kind)
            for names, fold in groups.items()
        }
        assert found == EXPECTED[family]
        for fold in groups.values():
            if fold is None:
                continue
            size = model.get_submodule(f"{block.name}.{fold.producer}").weight.shape[0]
            fold.apply(block.module, torch.rand(size) + 0.3)
        torch.testing.assert_close(model(data[0]).logits, exact, rtol=1e-3, atol=1e-4)
        changed = [k for k, v in model.state_dict().items() if not torch.equal(before[k], v)]
        assert len(changed) >= 4


def test_a_scale_is_not_folded_where_another_layer_would_see_it():
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x):
            x = self.norm(x)
            return x + self.up(x)  # the norm's output is used besides

    model = nn.Sequential(Leaky(), Leaky())
    with torch.no_grad():
        block = first_block(model, [torch.randn(20, 16)])
        assert FoldFinder().find(block, ("up",)) is None
    result = pumice.compress(model, pumice.AWQ(4, 16), [torch.randn(40, 16)])
    assert torch.equal(result[0].norm.weight, model[0].norm.weight)


def test_the_search_of_scales_equals_brute_force():
    """Every α is tried by hand: fold, round, run the module, compare."""
    model, data = build("llama"), samples(2)
    grid = Grid(3, False)
    with torch.no_grad():
        block = first_block(model, data)
        stage = ScaleStage(grid, 32, 20, 10**9)
        for group in block.collect(lambda _, m: MeanAbs(m.in_features, CPU)):
            fold = FoldFinder().find(block, group.names)
            holder = {4: "self_attn", 3: "self_attn", 2: "mlp"}.get(
                len(group.names), group.names[0]
            )
            module = block.module.get_submodule(holder)
            calls = []
            handle = module.register_forward_hook(
                lambda _, args, kwargs, out, calls=calls: calls.append((args, kwargs, out)),
                with_kwargs=True,
            )
            for sample in range(len(data)):
                block.run(sample)
            handle.remove()
            x = torch.cat(
                [inputs_of(block, group.names[0], i).flatten(0, -2) for i in range(len(data))]
            )
            mean = x.abs().mean(0)
            torch.testing.assert_close(group.statistic.value, mean)
            losses = []
            for step in range(20):
                s = scale_of(fold.tied(mean), step / 20)
                wide = fold.spread(s)
                saved = [block.layers[n].weight.clone() for n in group.names]
                for n in group.names:
                    w = block.layers[n].weight
                    w.copy_(grid.round_trip(w * wide, 32) / wide)
                loss = 0.0
                for args, kwargs, out in calls:
                    new = module(*args, **kwargs)
                    new, out = (y[0] if isinstance(y, tuple) else y for y in (new, out))
                    loss += float((new - out).double().square().sum())
                losses.append(loss)
                for n, w in zip(group.names, saved, strict=True):
                    block.layers[n].weight.copy_(w)
            best = min(range(20), key=losses.__getitem__)
            found = stage.search(block, group, fold)
            torch.testing.assert_close(found, scale_of(fold.tied(mean), best / 20))
            assert losses[best] < losses[0] or best == 0


def inputs_of(block, name, sample):
    caught = []
    handle = block.layers[name].register_forward_pre_hook(lambda _, a: caught.append(a[0]))
    block.run(sample)
    handle.remove()
    return caught[0]


def test_values_shared_by_query_heads_share_their_scales():
    model, data = build("llama"), samples(1)
    with torch.no_grad():
        fold = FoldFinder().find(first_block(model, data), ("self_attn.o_proj",))
    assert (fold.heads, fold.width) == (2, 16)
    small = torch.arange(32.0)
    assert torch.equal(fold.tied(fold.spread(small)), small)
    assert torch.equal(fold.spread(small)[:32], torch.arange(16.0).repeat(2))


@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_equals_brute_force(group_size, symmetric):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 40, generator=generator) ** 3
    x = torch.randn(30, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    size = 40 if group_size == -1 else group_size
    statistic = DiagonalBlocks(40, size, CPU)
    statistic.add(x)
    grid = Grid(3, symmetric)
    result = clip(weight, statistic.value, grid, group_size)
    clipped_any = False
    for row in range(3):
        for start in range(0, 40, size):
            part = slice(start, start + size)
            w = weight[row, part]
            best = None
            for step in range(10):
                limit = w.abs().max() * (1 - step / 20)
                candidate = w.clamp(-limit, limit)
                rounded = grid.round_trip(candidate[None], -1)[0]
                error = ((rounded - w) @ x[:, part].T).double().square().sum()
                if best is None or error < best[0] * (1 - 1e-6):
                    best = error, candidate
                    clipped_any |= step > 0
            torch.testing.assert_close(result[row, part], best[1])
    assert clipped_any


def test_queries_and_keys_are_not_clipped():
    model, data = build("llama"), samples(1)
    with torch.no_grad():
        block = first_block(model, data)
        before = {n: m.weight.clone() for n, m in block.layers.items()}
        ClipStage(Grid(2, False), 32).process(block)
        changed = {n for n, m in block.layers.items() if not torch.equal(m.weight, before[n])}
    assert changed == before.keys() - {"self_attn.q_proj", "self_attn.k_proj"}


def test_scaling_survives_saving(tmp_path):
    """Norms and biases were changed too, and travel with the checkpoint."""
    model, data = build("qwen2"), samples(2)
    result = pumice.compress(model, pumice.AWQ(4, 32, grid=4), data)
    changed = [
        name
        for name, tensor in result.state_dict().items()
        if "norm" in name and not torch.equal(tensor, model.state_dict()[name])
    ]
    assert changed
    pumice.save(result, tmp_path / "saved")
    loaded = pumice.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(data[0]).logits, result(data[0]).logits)
