"""compressed-tensors' sparse-24-bitmask: the bits of a layer, and whole checkpoints."""

import json

import pytest
import torch
from torch import nn

import pumice
from pumice.integrations.formats import sparse24_bitmask
from pumice.nn import Int4Linear, Int8Linear, Sparse24Linear
from pumice.ops import sparse24_compress, sparse24_decompress

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weight_24(n, k, dtype=torch.float32, seed=0):
    """At most two nonzeros of every four, now and then fewer."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(n, k // 4, 4, generator=generator).argsort(2) < 2
    keep &= torch.rand(n, k // 4, 4, generator=generator) > 0.1
    return (torch.randn(n, k, generator=generator) * keep.view(n, k)).to(dtype)


def lay_out(w):
    """By the definition, one weight after the other; fewer nonzeros: zeros at the lowest places."""
    n, k = w.shape
    compressed = torch.zeros(n, k // 2, dtype=w.dtype)
    bitmask = torch.zeros(n, -(-k // 8), dtype=torch.uint8)
    for row in range(n):
        stored = 0
        for start in range(0, k, 4):
            group = range(start, start + 4)
            columns = [c for c in group if w[row, c] != 0]
            columns += [c for c in group if c not in columns][: 2 - len(columns)]
            for column in sorted(columns):
                compressed[row, stored] = w[row, column]
                bitmask[row, column // 8] |= 1 << (column % 8)
                stored += 1
    return {
        "compressed": compressed,
        "bitmask": bitmask,
        "shape": torch.tensor([[n], [k]]),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 4), (5, 12), (3, 64), (7, 36)])
def test_the_layout(n, k, dtype):
    w = weight_24(n, k, dtype)
    expected = lay_out(w)
    written = sparse24_bitmask.write(*sparse24_compress(w))
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name
    values, meta = sparse24_bitmask.read(expected, n=n, k=k)
    assert torch.equal(sparse24_decompress(values, meta), w)


def test_zeros_may_be_stored_anywhere():
    """Ours are at the lowest places; another writer's are where they happen to be."""
    w = torch.tensor([[0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0]])
    tensors = {
        "compressed": torch.tensor([[0.0, 5.0, 0.0, -0.0]]),
        "bitmask": torch.tensor([[0b11001100]], dtype=torch.uint8),
        "shape": torch.tensor([1, 8]),
    }
    values, meta = sparse24_bitmask.read(tensors, n=1, k=8)
    for got, expected in zip((values, meta), sparse24_compress(w), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bitmask"), r"'a\.bitmask' is missing"),
        (lambda t: t.pop("shape"), r"'a\.shape' must hold \[3, 12\], not None"),
        (lambda t: t.update(shape=torch.tensor([3, 16])), r"must hold \[3, 12\], not \[3, 16\]"),
        (lambda t: t.update(compressed=t["compressed"].int()), r"'a\.compressed' must be float32"),
        (lambda t: t.update(compressed=t["compressed"][:, 1:]), r"must have shape \[3, 6\]"),
        (lambda t: t.update(extra=t["shape"]), r"'a\.extra' is not part of the format"),
        (lambda t: t["bitmask"].__setitem__((1, 0), 0b01110011), r"row 1, group 1 .columns 4 … 7"),
        (lambda t: t["bitmask"].__setitem__((2, 1), 0b10011), r"bits set beyond column 11"),
    ],
)
def test_broken_layers_are_named(change, message):
    tensors = lay_out(weight_24(3, 12))
    change(tensors)
    with pytest.raises(ValueError, match=message):
        sparse24_bitmask.read(tensors, n=3, k=12, layer="a")


def test_inputs_are_a_multiple_of_four():
    with pytest.raises(ValueError, match="'a' has 10 inputs"):
        sparse24_bitmask.read(lay_out(weight_24(3, 12)), n=3, k=10, layer="a")


# ---- the library itself: versions up to 0.14 or so, for 0.20 has no such compressor


@pytest.fixture
def compressor():
    module = pytest.importorskip(
        "compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask",
        reason="compressed-tensors with a 2:4 compressor is not installed",
    )
    return module.Sparse24BitMaskTensor


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_ours_and_writes_what_we_read(compressor, dtype):
    w = weight_24(16, 96, dtype)
    theirs = compressor.from_dense(w, "2:4").dict("layer")
    tensors = {name.removeprefix("layer."): tensor for name, tensor in theirs.items()}
    values, meta = sparse24_bitmask.read(tensors, n=16, k=96)
    assert torch.equal(sparse24_decompress(values, meta), w)
    opened = compressor.from_compressed_data(**sparse24_bitmask.write(values, meta))
    assert torch.equal(opened.decompress(), w)


def test_whole_models_both_ways(compressor, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pumice[hf] is not installed")
    from compressed_tensors.compressors import ModelCompressor

    from tiny_transformers import build

    model = build("llama")
    sparse = pumice.compress(model, pumice.Magnitude(pattern="2:4"))
    pumice.save(sparse, tmp_path / "ours", format="compressed-tensors")
    opened = transformers.LlamaForCausalLM(model.config)
    ModelCompressor.from_pretrained(tmp_path / "ours").decompress(tmp_path / "ours", opened)
    layers = [row.name for row in pumice.report(sparse).layers]
    for name in layers:
        weight = opened.get_submodule(name).weight
        assert torch.equal(weight, sparse.get_submodule(name).dequantize())

    dense = pumice.compress(model, pumice.Magnitude(pattern="2:4", store="dense"))
    theirs = ModelCompressor.from_pretrained_model(dense, sparsity_config="sparse-24-bitmask")
    theirs.sparsity_config.targets, theirs.sparsity_config.ignore = ["Linear"], ["lm_head"]
    dense.save_pretrained(tmp_path / "theirs", state_dict=theirs.compress(dense))
    theirs.update_config(tmp_path / "theirs")
    loaded = pumice.load(tmp_path / "theirs")
    for name in layers:
        layer = loaded.get_submodule(name)
        assert isinstance(layer, Sparse24Linear)
        assert torch.equal(layer.dequantize(), dense.get_submodule(name).weight)


# ---- checkpoints

X = torch.linspace(-2, 2, 3 * 32).reshape(3, 32)


def make_module(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 64, bias=False), nn.GELU(), nn.Linear(64, 8)
    ).to(dtype)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_of_2_of_4_layers(dtype, tmp_path):
    model = make_module(dtype)
    pruned = pumice.compress(model, pumice.Magnitude(pattern="2:4"), include=["0", "2"])
    pumice.save(pruned, tmp_path / "ct", format="compressed-tensors")
    config = config_of(tmp_path / "ct")
    assert config == {
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": "sparse-24-bitmask",
            "targets": ["Linear"],
            "ignore": ["4"],
            "sparsity_structure": "2:4",
            "global_sparsity": 0.5,
            "registry_requires_subclass": False,
        },
    }
    loaded = pumice.load(tmp_path / "ct", make_module(dtype))
    assert [type(m) for m in loaded] == [Sparse24Linear, nn.GELU] * 2 + [nn.Linear]
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(X.to(dtype)), pruned(X.to(dtype)))


def test_other_layers_may_be_quantized(tmp_path):
    model = make_module()
    first = pumice.compress(model, pumice.Magnitude(pattern="2:4"), include="0")
    second = pumice.compress(first, pumice.RTN(4, 16), include="2")
    third = pumice.compress(second, pumice.Int8(), include="4")
    pumice.save(third, tmp_path / "ct", format="compressed-tensors")
    config = config_of(tmp_path / "ct")
    assert config["sparsity_config"]["targets"] == ["0"]
    assert {tuple(g["targets"]) for g in config["config_groups"].values()} == {("2",), ("4",)}
    loaded = pumice.load(tmp_path / "ct", make_module())
    assert [type(m) for m in loaded][::2] == [Sparse24Linear, Int4Linear, Int8Linear]
    assert torch.equal(loaded(X), third(X))


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_and_2_of_4_is_written_as_int4_with_zeros(symmetric, tmp_path):
    """The format has no place for both; the weights are the same, the half of them stored twice."""
    model = make_module()
    recipe = pumice.SparseGPT(pattern="2:4", bits=4, group_size=32, symmetric=symmetric)
    pruned = pumice.compress(model, recipe, [torch.randn(400, 32)], include="0")
    assert isinstance(pruned[0], Sparse24Linear)
    pumice.save(pruned, tmp_path / "ct", format="compressed-tensors")
    assert config_of(tmp_path / "ct")["format"] == "pack-quantized"
    loaded = pumice.load(tmp_path / "ct", make_module())
    assert isinstance(loaded[0], Int4Linear)
    assert torch.equal(loaded[0].dequantize(), pruned[0].dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "sparse-bitmask"}, "sparsity_config of format 'sparse-bitmask' is not read"),
        ({"sparsity_structure": "0:0"}, "sparsity_structure '0:0' is not read, only '2:4'"),
    ],
)
def test_other_sparse_formats_are_refused(change, message, tmp_path):
    pruned = pumice.compress(make_module(), pumice.Magnitude(pattern="2:4"))
    pumice.save(pruned, tmp_path / "ct", format="compressed-tensors")
    path = tmp_path / "ct" / "config.json"
    stored = json.loads(path.read_text())
    stored["quantization_config"]["sparsity_config"].update(change)
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=message):
        pumice.load(tmp_path / "ct", make_module())


@pytest.mark.parametrize("format_name", ["gptq", "awq"])
def test_formats_without_a_place_for_2_of_4_say_so(format_name, tmp_path):
    pruned = pumice.compress(make_module(), pumice.Magnitude(pattern="2:4"))
    with pytest.raises(ValueError, match=r"layer '0' cannot be written.*Sparse24Linear"):
        pumice.save(pruned, tmp_path / "out", format=format_name)
