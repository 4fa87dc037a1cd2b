"""Int4Linear with columns kept in 16 bits (OWQ) and a low-rank term (ZeroQuant-V2)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pumice
from pumice.integrations.formats._packed import PackedWeight
from pumice.nn import Int4Linear, layer_from_config

N, K = 7, 40


def make(
    outliers: int = 3,
    rank: int = 2,
    zeros: bool = False,
    order: str = "natural",
    dense: torch.dtype = torch.float16,
    group_size: int = 16,
    bits: int = 4,
) -> tuple[Int4Linear, Tensor, nn.Linear]:
    """A layer of random contents, and the weight it stands for."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(K, N)
    groups = 1 if group_size == -1 else -(-K // group_size)
    size = K if group_size == -1 else group_size
    q = torch.randint(0, 2**bits, (N, K), generator=generator).to(torch.uint8)
    scales = torch.rand(N, groups, generator=generator).add(0.1).half()
    z = torch.randint(0, 2**bits, (N, groups), generator=generator).to(torch.uint8)
    shuffled = torch.randperm(K, generator=generator)
    group = torch.arange(K) // size
    if order == "g_idx":
        group = group[shuffled]
    zero = z.float()[:, group] if zeros else 2.0 ** (bits - 1)
    weight = (q.float() - zero) * scales.float()[:, group]
    if order == "perm":
        weight = torch.zeros_like(weight).index_copy_(1, shuffled, weight)
    given: dict[str, Any] = {}
    if outliers:
        given["outlier_idx"] = torch.randperm(K, generator=generator)[:outliers]
        given["outlier_weight"] = torch.randn(N, outliers, generator=generator).to(dense)
        weight[:, given["outlier_idx"]] = given["outlier_weight"].float()
    if rank:
        given["lora_a"] = torch.randn(rank, K, generator=generator).to(dense)
        given["lora_b"] = torch.randn(N, rank, generator=generator).to(dense)
        weight += given["lora_b"].float() @ given["lora_a"].float()
    if order != "natural":
        given[order] = shuffled if order == "perm" else group
    layer = Int4Linear.from_quantized(
        linear, q, scales, z if zeros else None, bits=bits, group_size=group_size, **given
    )
    return layer, weight, linear


FORMS: list[dict[str, Any]] = [
    {},
    {"outliers": 0},
    {"rank": 0, "zeros": True},
    {"order": "perm", "zeros": True},
    {"order": "g_idx", "zeros": True, "dense": torch.bfloat16},
    {"bits": 3, "order": "perm", "group_size": -1, "dense": torch.float32},
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_computes_with_the_weight_it_stands_for(form: dict[str, Any], dtype: torch.dtype) -> None:
    layer, weight, linear = make(**form)
    torch.testing.assert_close(layer.dequantize(), weight, rtol=1e-6, atol=1e-6)
    assert layer.dequantize(torch.bfloat16).dtype == torch.bfloat16
    x = torch.randn(3, 2, K).to(dtype)
    with torch.no_grad():
        y = layer(x)
        expected = nn.functional.linear(x.float(), weight, linear.bias)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert (y.float() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("form", FORMS)
def test_survives_a_state_dict_and_a_checkpoint(form: dict[str, Any], tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    layer, _, _ = make(**form)
    x = torch.randn(2, K)
    twin = layer_from_config(layer.config(), dtype=torch.float32)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    pumice.save(nn.Sequential(layer), tmp_path / "saved")
    loaded = pumice.load(tmp_path / "saved", nn.Sequential(nn.Linear(K, N)))
    assert torch.equal(loaded(x), layer(x))
    assert loaded[0].config() == layer.config()  # type: ignore[index]


def test_casts_keep_the_dense_terms() -> None:
    layer, weight, _ = make()
    layer.to(torch.bfloat16)
    for name in ("outlier_weight", "lora_a", "lora_b"):
        assert getattr(layer, name).dtype == torch.float16
    torch.testing.assert_close(layer.dequantize(), weight, rtol=1e-6, atol=1e-6)


def test_gradients_reach_the_input() -> None:
    layer, weight, _ = make(order="perm", zeros=True)
    x = torch.randn(3, K, requires_grad=True)
    dy = torch.randn(3, N)
    layer(x).backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dy @ weight, rtol=1e-3, atol=1e-3)


def test_other_formats_have_no_place_for_them() -> None:
    for form, term in (({"rank": 0}, "outlier columns"), ({"outliers": 0}, "a low-rank term")):
        with pytest.raises(ValueError, match=f"it has {term}, for which the format has no place"):
            PackedWeight.from_layer(make(**form)[0])


def test_a_layer_described_before_there_were_such_terms() -> None:
    layer, _, _ = make(outliers=0, rank=0)
    config = layer.config()
    for name in ("outliers", "rank", "dense_dtype"):
        del config[name]
    assert layer_from_config(config).config() == layer.config()


Q = torch.zeros(N, K, dtype=torch.uint8)
S = torch.ones(N, 3).half()
OUTLIERS = {"outlier_idx": torch.tensor([3, 7]), "outlier_weight": torch.ones(N, 2).half()}
LOW_RANK = {"lora_a": torch.ones(2, K).half(), "lora_b": torch.ones(N, 2).half()}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"outlier_idx": OUTLIERS["outlier_idx"]},
            ValueError,
            "outlier_idx and outlier_weight belong",
        ),
        ({"lora_b": LOW_RANK["lora_b"]}, ValueError, "lora_a and lora_b belong together"),
        (
            {**OUTLIERS, "outlier_idx": torch.tensor([3, 40])},
            ValueError,
            r"in \[0, 40\), but holds 40",
        ),
        (
            {**OUTLIERS, "outlier_idx": torch.tensor([-1, 2])},
            ValueError,
            r"in \[0, 40\), but holds -1",
        ),
        ({**OUTLIERS, "outlier_idx": torch.tensor([2, 2])}, ValueError, "names a column twice"),
        (
            {**OUTLIERS, "outlier_idx": torch.tensor([2])},
            ValueError,
            r"outlier_idx must have shape \[2\]",
        ),
        (
            {**OUTLIERS, "outlier_idx": torch.ones(2)},
            TypeError,
            "outlier_idx must be int32 or int64",
        ),
        (
            {**OUTLIERS, "outlier_weight": torch.ones(N, 2).int()},
            TypeError,
            "outlier_weight must be float",
        ),
        ({**OUTLIERS, "zeros": S}, ValueError, "outlier columns need zeros that are integers"),
        (
            {**LOW_RANK, "lora_a": torch.ones(2, 39).half()},
            ValueError,
            r"lora_a must have shape \[2, 40\]",
        ),
        (
            {**LOW_RANK, "lora_b": torch.ones(N, 2)},
            TypeError,
            "lora_b must be float16, not float32",
        ),
        (
            {**OUTLIERS, **LOW_RANK, "lora_a": torch.ones(2, K)},
            TypeError,
            "lora_a must be float16, not float32",
        ),
        ({"zeros": torch.full((N, 3), 16, dtype=torch.uint8)}, ValueError, "zeros hold 16, but 15"),
    ],
)
def test_refusals_name_the_argument(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"q": Q, "scales": S, "bits": 4, "group_size": 16, **arguments}
    with pytest.raises(error, match=message):
        Int4Linear.from_quantized(nn.Linear(K, N), **given)


@pytest.mark.parametrize("options", [{"outliers": -1}, {"rank": 1.5}, {"dense_dtype": "float64"}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Int4Linear: {next(iter(options))} must be"):
        Int4Linear(K, N, **options)


BAD_VALUES = [
    ("perm", torch.zeros(K, dtype=torch.int32), "perm is not a permutation of 0 … 39"),
    ("perm", torch.arange(K, dtype=torch.int32) + 1, "perm is not a permutation"),
    ("outlier_idx", torch.tensor([1, 2, 40], dtype=torch.int32), "but holds 40"),
    ("outlier_idx", torch.tensor([1, 1, 2], dtype=torch.int32), "names a column twice"),
    ("zeros", torch.full((N, 3), 200, dtype=torch.uint8), "zeros hold 200, but 15 is the largest"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_values_out_of_range_are_not_loaded(name: str, value: Tensor, message: str) -> None:
    """On CUDA the operator does not look at them."""
    layer, weight, _ = make(order="perm", zeros=True)
    state = {**layer.state_dict(), name: value}
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(getattr(layer, name), layer.state_dict()[name])
    torch.testing.assert_close(layer.dequantize(), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES)
def test_a_checkpoint_of_values_out_of_range_is_refused(
    name: str, value: Tensor, message: str, tmp_path: Any
) -> None:
    pytest.importorskip("safetensors")
    layer, _, _ = make(order="perm", zeros=True)
    setattr(layer, name, value)
    pumice.save(nn.Sequential(layer), tmp_path / "saved")
    skeleton = nn.Sequential(nn.Linear(K, N))
    for model in (skeleton, nn.Sequential(make(order="perm", zeros=True)[0])):
        with pytest.raises(ValueError, match=f"layer '0': .*{message}"):
            pumice.load(tmp_path / "saved", model)
    assert isinstance(skeleton[0], nn.Linear)  # left as it was
