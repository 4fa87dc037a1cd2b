"""Checkpoints: the same bits back."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

import pumice
from pumice import _tensors
from pumice.nn import Int8Linear, Int8MixedLinear
from saved_model import X, assert_same_bits, make_model, save_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "recipe",
    [
        pumice.LLMInt8(),
        pumice.LLMInt8(threshold=float("inf"), per_element=True),
        pumice.Int8(),
        pumice.Int8(activations="per_tensor", weights="per_tensor"),
    ],
    ids=str,
)
@pytest.mark.parametrize("skeleton_device", ["cpu", "meta"])
def test_round_trip(tmp_path, dtype, recipe, skeleton_device):
    model = save_model(tmp_path / "m", recipe, dtype)
    skeleton = make_model(dtype, skeleton_device)
    loaded = pumice.load(tmp_path / "m", skeleton)
    assert loaded is skeleton
    assert_same_bits(model, loaded)
    assert torch.equal(loaded(X.to(dtype)), model(X.to(dtype)))
    assert pumice.report(loaded) == pumice.report(model)
    assert [type(module) for module in loaded] == [type(module) for module in model]
    assert loaded[0].config() == model[0].config()


def test_static_and_smoothed_layers_round_trip(tmp_path):
    model = make_model()
    model[0] = Int8Linear.from_linear(
        model[0], activations="per_tensor", activation_scale=0.1, smooth=torch.rand(12) + 0.5
    )
    model[3] = Int8MixedLinear.from_linear(model[3])
    pumice.save(model, tmp_path / "m")
    loaded = pumice.load(tmp_path / "m", make_model())
    assert_same_bits(model, loaded)
    assert torch.equal(loaded(X), model(X))


def test_loading_into_a_model_compressed_already(tmp_path):
    model = save_model(tmp_path / "m")
    with torch.no_grad():
        skeleton = pumice.compress(make_model(), pumice.LLMInt8(threshold=2.0))
        skeleton[0].qweight.zero_()
    assert_same_bits(pumice.load(tmp_path / "m", skeleton), model)
    other = pumice.compress(make_model(), pumice.LLMInt8(threshold=3.0))
    with pytest.raises(ValueError, match=r"layer '0' is compressed already.*3\.0.*2\.0"):
        pumice.load(tmp_path / "m", other)


def test_an_uncompressed_model_round_trips(tmp_path):
    model = make_model()
    pumice.save(model, tmp_path / "m")
    loaded = pumice.load(tmp_path / "m", make_model().apply(lambda m: None))
    assert_same_bits(model, loaded)
    with pytest.raises(ValueError, match="has no report"):
        pumice.report(loaded)


def test_a_bare_linear(tmp_path):
    model = pumice.compress(nn.Linear(12, 5), pumice.LLMInt8())
    pumice.save(model, tmp_path / "m")
    loaded = pumice.load(tmp_path / "m", nn.Linear(12, 5))
    assert type(loaded) is Int8MixedLinear
    assert torch.equal(loaded(X), model(X))


class Tied(nn.Module):
    def __init__(self, *, tied: bool = True, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(9, 12)
        self.body = nn.Linear(12, 12)
        self.again = self.body
        self.lm_head = nn.Linear(12, 9, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.again(torch.tanh(self.body(self.embed(ids)))))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ties_survive_and_are_stored_once(tmp_path, device):
    model = pumice.compress(Tied(), pumice.LLMInt8())
    pumice.save(model, tmp_path / "m")
    stored = safetensors.torch.load_file(tmp_path / "m/model.safetensors")
    assert set(stored) == {"embed.weight", "body.qweight", "body.weight_scale", "body.bias"}
    with torch.device(device):
        skeleton = Tied(seed=1)
    loaded = pumice.load(tmp_path / "m", skeleton)
    assert loaded.lm_head.weight is loaded.embed.weight
    assert loaded.body is loaded.again
    assert isinstance(loaded.body, Int8MixedLinear)
    assert_same_bits(model, loaded)


def test_ties_of_checkpoint_and_model_may_differ_only_where_the_bits_agree(tmp_path):
    pumice.save(Tied(), tmp_path / "tied")
    loaded = pumice.load(tmp_path / "tied", Tied(tied=False, seed=1))
    assert torch.equal(loaded.lm_head.weight, loaded.embed.weight)
    assert loaded.lm_head.weight is not loaded.embed.weight
    pumice.save(Tied(tied=False), tmp_path / "untied")
    with pytest.raises(ValueError, match=r"ties 'lm_head\.weight' to 'embed\.weight', but.*differ"):
        pumice.load(tmp_path / "untied", Tied())


def test_views_of_one_memory_are_stored_apart(tmp_path):
    model = nn.Module()
    whole = torch.arange(24.0).reshape(4, 6)
    model.register_buffer("whole", whole)
    model.register_buffer("part", whole[1:3])
    model.register_buffer("transposed", whole.T)
    pumice.save(model, tmp_path / "m")
    skeleton = nn.Module()
    for name, shape in (("whole", (4, 6)), ("part", (2, 6)), ("transposed", (6, 4))):
        skeleton.register_buffer(name, torch.zeros(shape))
    assert_same_bits(model, pumice.load(tmp_path / "m", skeleton))


def test_large_models_are_split_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(_tensors, "MAX_FILE_BYTES", 200)
    model = save_model(tmp_path / "m")
    names = {path.name for path in (tmp_path / "m").iterdir()}
    parts = sorted(name for name in names if name.endswith(".safetensors"))
    assert len(parts) > 1
    assert parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    assert_same_bits(model, pumice.load(tmp_path / "m", make_model()))
    (tmp_path / "m" / parts[1]).unlink()
    with pytest.raises(ValueError, match=f"{parts[1]} is missing"):
        pumice.load(tmp_path / "m", make_model())


def test_frozen_and_training_parameters_and_modes_are_the_models_own(tmp_path):
    save_model(tmp_path / "m")
    skeleton = make_model(device="meta").eval()
    skeleton[1].requires_grad_(False)
    skeleton[0].bias.requires_grad_(False)
    loaded = pumice.load(tmp_path / "m", skeleton)
    assert not loaded[1].weight.requires_grad
    assert not loaded[0].bias.requires_grad
    assert not loaded[0].training


def test_parameters_that_have_memory_keep_their_identity(tmp_path):
    save_model(tmp_path / "m")
    skeleton = make_model()
    weight = skeleton[1].weight
    pumice.load(tmp_path / "m", skeleton)
    assert skeleton[1].weight is weight


def test_loading_onto_another_device(tmp_path):
    save_model(tmp_path / "m")
    loaded = pumice.load(tmp_path / "m", make_model(), device="meta")
    assert all(tensor.is_meta for tensor in loaded.state_dict().values())


def test_buffers_that_no_checkpoint_holds_must_have_data(tmp_path):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 12)
            self.register_buffer("table", torch.arange(12.0), persistent=False)

        def forward(self, x):
            return self.linear(x + self.table)

    model = pumice.compress(Positions(), pumice.LLMInt8())
    pumice.save(model, tmp_path / "m")
    with torch.device("meta"):
        skeleton = Positions()
    with pytest.raises(ValueError, match=r"buffers table are not part of a state dict"):
        pumice.load(tmp_path / "m", skeleton)
    assert torch.equal(pumice.load(tmp_path / "m", Positions())(X), model(X))


def test_such_buffers_get_the_dtype_that_they_were_saved_in(tmp_path):
    """A rotary table made in fp32 and cast with the model must be cast again."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 12)
            self.register_buffer("table", torch.rand(12, generator=torch.manual_seed(3)), False)

        def forward(self, x):
            return self.linear(x + self.table)

    model = pumice.compress(Positions(), pumice.LLMInt8()).bfloat16()
    pumice.save(model, tmp_path / "m")
    skeleton = Positions()
    skeleton.linear.bfloat16()
    loaded = pumice.load(tmp_path / "m", skeleton)
    assert loaded.table.dtype == torch.bfloat16
    assert torch.equal(loaded(X.bfloat16()), model(X.bfloat16()))
