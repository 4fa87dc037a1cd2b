"""Files and tensors written by the packages that own the formats, and ours opened by them.

Tried with compressed-tensors 0.20, gptqmodel 7.7 and autoawq 0.2.9 (all without a GPU). Only the
first comes with pumice[test]; the others pin other versions of torch and are installed by hand.
"""

import pytest
import torch
from format_layouts import Weight, assert_same_tensors, awq_layer, gptq_layer, make_weight
from torch import nn

import pumice
from pumice.integrations.formats import awq, gptq
from pumice.integrations.formats import compressed_tensors as ct
from pumice.nn import Int4Linear, Int8Linear

transformers = pytest.importorskip("transformers", reason="pumice[hf] is not installed")
from tiny_llama import make_tokenizer as byte_tokenizer  # noqa: E402 (needs transformers)

IDS = torch.arange(18).reshape(2, 9)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        dtype=torch.float32,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def make_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = "a", "b"
    return tokenizer


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def linear_of(weight: Weight) -> nn.Linear:
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False)
    linear.weight.data = weight.dense()
    return linear


# ---- compressed-tensors


@pytest.fixture
def library():
    return pytest.importorskip("compressed_tensors", reason="compressed-tensors not installed")


def scheme_of(library, **weights):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [5, 32])
def test_compressed_tensors_packs_as_we_do(library, n, bits, group_size, symmetric):
    from compressed_tensors.compressors import PackedQuantizationCompressor

    weight = make_weight(
        n, 96, bits, group_size, symmetric=symmetric, lowest_zero=0, dtype=torch.float32
    )
    strategy = {"strategy": "channel"} if group_size == -1 else {"group_size": 32}
    scheme = scheme_of(library, num_bits=bits, symmetric=symmetric, **strategy)
    state = {"weight": weight.dense(), "weight_scale": weight.scales}
    if not symmetric:
        state["weight_zero_point"] = (weight.zeros - 2 ** (bits - 1)).to(torch.int8)
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    packed = ct.read_packed(
        theirs, n=n, k=96, bits=bits, group_size=group_size, symmetric=symmetric
    )
    assert torch.equal(packed.unpack().long(), weight.q)
    assert torch.equal(packed.dequantize(), weight.dense())
    ours = ct.write_packed(packed)
    assert_same_tensors(ours, theirs)
    opened = PackedQuantizationCompressor.decompress(ours, scheme)
    assert torch.equal(opened["weight"], weight.dense())


def quantized_by(library, scheme: dict, folder) -> nn.Module:
    """A tiny model quantized, compressed and saved by compressed-tensors itself."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = llama()
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], **scheme}}, ignore=["lm_head"]
    )
    apply_quantization_config(model, config)
    bits = scheme["weights"]["num_bits"]
    size = scheme["weights"].get("group_size")
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "weight_scale"):
            groups = module.weight.detach().unflatten(1, (-1, size or module.in_features))
            scale = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
            if scheme["weights"]["symmetric"]:
                scale = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
            else:
                zero = -(2 ** (bits - 1)) - groups.amin(-1) / scale
                module.weight_zero_point.data = zero.round().to(module.weight_zero_point.dtype)
            module.weight_scale.data = scale.to(module.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return model


def opened_by_transformers(folder, *, symmetric: bool = True) -> nn.Module:
    """Through compressed-tensors, without a tensor missing or left over.

    Zero points: transformers 5.23 with compressed-tensors 0.20 opens no such file, not even their
    own, in compressed form (it expects unpacked ones); decompressed while loading, it does.
    """
    arguments = {}
    if not symmetric:
        arguments["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **arguments
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    logits(model)  # the first call decompresses
    return model


SCHEMES = {
    "4 bits, symmetric": {"weights": {"num_bits": 4, "symmetric": True, "group_size": 32}},
    "4 bits, asymmetric": {"weights": {"num_bits": 4, "symmetric": False, "group_size": 32}},
    "8 bits, by channel": {"weights": {"num_bits": 8, "symmetric": True, "strategy": "channel"}},
    "int8 activations": {
        "weights": {"num_bits": 8, "symmetric": True, "strategy": "channel"},
        "input_activations": {
            "num_bits": 8,
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        },
    },
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_that_compressed_tensors_wrote(library, scheme, tmp_path):
    quantized_by(library, SCHEMES[scheme], tmp_path / "m")
    model = pumice.load(tmp_path / "m")
    expected = Int8Linear if scheme == "int8 activations" else Int4Linear
    theirs = opened_by_transformers(tmp_path / "m", symmetric="asymmetric" not in scheme)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, expected)}
    assert len(layers) == 14
    for name, layer in layers.items():
        dense = theirs.get_submodule(name).weight
        torch.testing.assert_close(layer.dequantize(), dense, rtol=1e-6, atol=0)
    bound = 0.02 if expected is Int8Linear else 1e-4
    assert (logits(model) - logits(theirs)).norm() < bound * logits(theirs).norm()


@pytest.mark.parametrize(
    "recipe",
    [
        pumice.RTN(group_size=32),
        pumice.RTN(bits=3, group_size=-1, symmetric=False),
        pumice.Int8(),
        pumice.LLMInt8(),
    ],
)
def test_transformers_opens_ours_through_compressed_tensors(library, recipe, tmp_path):
    model = pumice.compress(llama(), recipe)
    pumice.save(model, tmp_path / "m", format="compressed-tensors")
    symmetric = getattr(recipe, "symmetric", True)
    theirs = opened_by_transformers(tmp_path / "m", symmetric=symmetric)
    for name, layer in model.named_modules():
        if isinstance(layer, pumice.nn.CompressedLinear):
            dense = theirs.get_submodule(name).weight
            torch.testing.assert_close(layer.dequantize(dense.dtype), dense, rtol=1e-3, atol=0)
    assert (logits(theirs) - logits(model)).norm() < 0.02 * logits(model).norm()


def test_layers_of_several_kinds_in_one_file(library, tmp_path):
    model = pumice.compress(llama(), pumice.RTN(group_size=32), include="*.mlp.*")
    pumice.compress(model, pumice.Int8(), include="*.self_attn.*", inplace=True)
    pumice.save(model, tmp_path / "m", format="compressed-tensors")
    theirs = opened_by_transformers(tmp_path / "m")
    assert (logits(theirs) - logits(model)).norm() < 0.02 * logits(model).norm()


# ---- GPTQModel


@pytest.fixture
def torch_linear():
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed (it pins torch)")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return TorchLinear


def make_gptq_layer(torch_linear, weight: Weight):
    from gptqmodel.quantization import FORMAT

    n, k = weight.shape
    return torch_linear(
        bits=weight.bits,
        group_size=weight.group_size,
        sym=False,
        desc_act=True,
        in_features=k,
        out_features=n,
        bias=False,
        format=FORMAT.GPTQ_V2,
    )


def stored_tensors(layer: nn.Module, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    buffers = dict(layer.named_buffers())
    return {name: buffers[name] for name in names}


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_packs_as_we_do(torch_linear, bits, act_order):
    weight = make_weight(64, 128, bits, 32, act_order=act_order)
    layer = make_gptq_layer(torch_linear, weight)
    layer.pack_original(
        linear_of(weight), weight.scales.float(), weight.zeros.float(), weight.g_idx
    )
    theirs = stored_tensors(layer, gptq.TENSORS)
    packed = gptq.read(theirs, k=128, bits=bits, group_size=32, version=2)
    assert torch.equal(packed.unpack().long(), weight.q)
    assert_same_tensors(gptq.write(packed, version=2), theirs)
    assert_same_tensors(gptq_layer(weight, 2), theirs)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_opens_ours(torch_linear, bits, act_order):
    weight = make_weight(64, 128, bits, 32, act_order=act_order)
    packed = gptq.read(gptq_layer(weight), k=128, bits=bits, group_size=32)
    layer = make_gptq_layer(torch_linear, weight)
    for name, tensor in gptq.write(packed, version=2).items():
        getattr(layer, name).copy_(tensor)
    layer.post_init()
    dense = layer.dequantize_weight().T.float()
    torch.testing.assert_close(dense, packed.dequantize(), rtol=1e-3, atol=1e-4)


def same_weights_as_gptqmodel(model: nn.Module, theirs: nn.Module) -> None:
    """theirs: dequantized to float16, which is what rtol allows for."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Int4Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        dense = theirs.get_submodule(name).dequantize_weight().T.float()
        torch.testing.assert_close(layer.dequantize(), dense, rtol=1e-3, atol=1e-5)
    reference = logits(theirs).float()
    assert (logits(model).float() - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize(
    "settings",
    [
        {"sym": True, "desc_act": True, "act_group_aware": False},
        {"sym": False, "desc_act": False},
        {"sym": False, "desc_act": False, "format": "gptq_v2"},
    ],
    ids=["act-order", "asymmetric", "version 2"],
)
def test_a_model_that_gptqmodel_quantized(torch_linear, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # its default is too few where there are 2
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    llama().half().save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    config = QuantizeConfig(bits=4, group_size=32, **settings)
    quantizer = GPTQModel.load(str(tmp_path / "source"), config, device="cpu")
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 97, (8, 300), generator=generator).tolist()
    quantizer.quantize(
        [{"input_ids": ids, "attention_mask": [1] * 300} for ids in samples], batch_size=1
    )
    quantizer.save(str(tmp_path / "m"))
    model = pumice.load(tmp_path / "m")
    permuted = [m.permuted for m in model.modules() if isinstance(m, Int4Linear)]
    assert any(permuted) == settings["desc_act"]
    theirs = GPTQModel.load(
        str(tmp_path / "m"), device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH
    )
    same_weights_as_gptqmodel(model, theirs.model)


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq"])
def test_gptqmodel_opens_our_models(torch_linear, name, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel

    model = pumice.compress(llama(), pumice.RTN(group_size=32, symmetric=name == "gptq"))
    pumice.save(model, tmp_path / "m", format=name, tokenizer=make_tokenizer())
    backend = BACKEND.AWQ_TORCH if name == "awq" else BACKEND.GPTQ_TORCH
    theirs = GPTQModel.load(str(tmp_path / "m"), device="cpu", dtype=torch.float16, backend=backend)
    reference = logits(model)
    assert (logits(theirs.model).float() - reference).norm() < 0.005 * reference.norm()


# ---- AutoAWQ


@pytest.fixture
def wq_linear():
    pytest.importorskip("awq.modules.linear.gemm", reason="autoawq is not installed")
    from awq.modules.linear.gemm import WQLinear_GEMM

    return WQLinear_GEMM


@pytest.mark.parametrize("group_size", [16, 32, 96])
def test_autoawq_packs_as_we_do(wq_linear, group_size):
    from awq.utils.packing_utils import dequantize_gemm

    weight = make_weight(32, 96, 4, group_size, lowest_zero=0)
    layer = wq_linear.from_linear(
        linear_of(weight).half(), 4, group_size, scales=weight.scales.T, zeros=weight.zeros.T
    )
    theirs = stored_tensors(layer, awq.TENSORS)
    assert_same_tensors(awq_layer(weight), theirs)
    packed = awq.read(theirs, k=96, group_size=group_size)
    assert torch.equal(packed.unpack().long(), weight.q)
    ours = awq.write(packed)
    assert_same_tensors(ours, theirs)
    dense = dequantize_gemm(ours["qweight"], ours["qzeros"], ours["scales"], 4, group_size)
    torch.testing.assert_close(dense.T.float(), weight.dense(), rtol=1e-3, atol=1e-4)
