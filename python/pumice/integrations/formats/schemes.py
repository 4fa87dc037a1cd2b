"""The ``quantization_config`` of compressed-tensors: which layer is stored how.

::

    config_groups:
      group_0:
        targets: ["Linear"]             class names, "re:" patterns or names of layers
        format: "pack-quantized"        else that of the whole configuration
        weights: {num_bits, type: "int", symmetric, strategy: "group" | "channel" | "tensor",
                  group_size}
        input_activations: null, or {num_bits: 8, type: "int", symmetric: true, dynamic,
                  strategy: "token" | "tensor"}
    ignore: ["lm_head"]

Layers whose activations are int8 become :class:`pumice.nn.Int8Linear`; with weights alone
quantized, :class:`pumice.nn.Int4Linear`, also those of 8 bits. Layers of floating 2:4 weights are
listed apart, and become :class:`pumice.nn.Sparse24Linear`::

    sparsity_config: {format: "sparse-24-bitmask", sparsity_structure: "2:4", targets, ignore}

Refused, by name: floating types (fp8, fp4), activations of a packed layer, other sparsity and 2:4
weights that are quantized, too, rotations and a quantized cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pumice.integrations.formats import compressed_tensors as ct
from pumice.integrations.formats import sparse24_bitmask
from pumice.integrations.formats._config import config_bits, config_group_size
from pumice.integrations.formats._packed import PackedWeight
from pumice.nn import (
    CompressedLinear,
    Int4Linear,
    Int8Linear,
    Int8MixedLinear,
    Sparse24Linear,
)
from pumice.ops import int4_pack, sparse24_decompress

QUANT_METHOD = "compressed-tensors"
PACKED, INT8, NAIVE, MIXED = "pack-quantized", "int-quantized", "naive-quantized", "mixed-precision"


@dataclass(frozen=True)
class Scheme:
    """One of the ``config_groups``, checked."""

    targets: tuple[str, ...]
    packed: bool
    bits: int
    group_size: int
    symmetric: bool
    activations: str | None  # "token", "tensor", or None where they are not quantized
    dynamic: bool

    def rank(self, name: str) -> int | None:
        """How closely the scheme names a layer: 0 by its name, 1 by a pattern, 2 by its class."""
        ranks = []
        for target in self.targets:
            if target == name:
                ranks.append(0)
            elif target.startswith("re:") and re.match(target[3:], name):
                ranks.append(1)
            elif target == "Linear":
                ranks.append(2)
        return min(ranks, default=None)


class Reader:
    """Layers of a compressed-tensors checkpoint, as its ``quantization_config`` describes them."""

    markers: tuple[str, ...] = ("weight_scale", "compressed")

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._sparse = _is_sparse24(config.get("sparsity_config"))
        for entry in ("kv_cache_scheme", "transform_config"):
            if config.get(entry):
                raise ValueError(f"compressed-tensors with a {entry} is not read")
        stored = config.get("config_groups")
        if not stored and self._sparse:
            stored = {}
        elif not isinstance(stored, Mapping) or not stored:
            raise ValueError("quantization_config: compressed-tensors lacks its config_groups")
        self._schemes = [
            _scheme(group, entry, config.get("format")) for group, entry in stored.items()
        ]

    def make_layer(
        self, name: str, linear: nn.Linear, tensors: Mapping[str, Tensor]
    ) -> CompressedLinear:
        if "compressed" in tensors:
            return self._sparse_layer(name, linear, tensors)
        scheme = self._scheme_of(name)
        if scheme.packed:
            weight = ct.read_packed(
                tensors,
                n=linear.out_features,
                k=linear.in_features,
                bits=scheme.bits,
                group_size=scheme.group_size,
                symmetric=scheme.symmetric,
                layer=name,
            )
            return weight.to_layer(linear)
        if scheme.activations is None:
            weight = ct.int8_as_packed(
                tensors,
                n=linear.out_features,
                k=linear.in_features,
                group_size=scheme.group_size,
                layer=name,
            )
            return weight.to_layer(linear)
        per_token = scheme.activations == "token"
        return ct.read_int8(
            tensors, linear, dynamic=scheme.dynamic, per_token=per_token, layer=name
        )

    def _sparse_layer(
        self, name: str, linear: nn.Linear, tensors: Mapping[str, Tensor]
    ) -> Sparse24Linear:
        if not self._sparse:
            raise ValueError(
                f"'{name}.compressed' is there, but the configuration has no sparsity_config of "
                f"format {sparse24_bitmask.FORMAT!r}"
            )
        if "weight_scale" in tensors:
            raise ValueError(f"{name!r} is 2:4 and quantized at once, which is not read")
        values, meta = sparse24_bitmask.read(
            tensors, n=linear.out_features, k=linear.in_features, layer=name
        )
        layer = Sparse24Linear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            value_dtype=str(values.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            device="meta",
            dtype=linear.weight.dtype if linear.bias is None else linear.bias.dtype,
        )
        layer.values, layer.metadata, layer.bias = values, meta, linear.bias
        return layer.train(linear.training)

    def _scheme_of(self, name: str) -> Scheme:
        ranked = [(scheme.rank(name), scheme) for scheme in self._schemes]
        fitting = [(rank, index) for index, (rank, _) in enumerate(ranked) if rank is not None]
        if not fitting:
            raise ValueError(f"quantization_config: no config group has layer {name!r} as a target")
        return self._schemes[min(fitting)[1]]


class Writer:
    """A model's layers as a compressed-tensors checkpoint; layers may differ in all settings.

    :class:`~pumice.nn.Int8MixedLinear` (LLM.int8()) is written as 8-bit weights alone: the bytes of
    the weight are kept, and no other library would know its threshold. It comes back as an
    :class:`~pumice.nn.Int4Linear` of 8 bits. A :class:`~pumice.nn.Sparse24Linear` of integers is
    written as the dense layer of the same weights, with zero points (or zeros) where nothing is
    kept, for the format has one or the other; so it comes back dense.
    """

    def write_layer(self, name: str, layer: CompressedLinear) -> dict[str, Tensor]:
        if isinstance(layer, Int8Linear):
            return ct.write_int8(layer)
        if isinstance(layer, Int4Linear):
            return ct.write_packed(PackedWeight.from_layer(layer))
        if isinstance(layer, Int8MixedLinear):
            return ct.write_packed(_as_packed(layer))
        if isinstance(layer, Sparse24Linear):
            return _sparse_tensors(layer)
        raise ValueError(f"compressed-tensors has no place for a {type(layer).__name__}")

    def describe(self, layers: Mapping[str, CompressedLinear], left: list[str]) -> dict[str, Any]:
        """The ``quantization_config``; ``left`` are the linear layers that are not compressed."""
        sparse = [name for name, layer in layers.items() if _is_float24(layer)]
        by_scheme: dict[str, list[str]] = {}
        for name, layer in layers.items():
            if name in sparse:
                continue
            by_scheme.setdefault(json.dumps(_describe(layer)), []).append(name)
        described: dict[str, Any] = {"quant_method": QUANT_METHOD}
        if sparse:
            others = [name for name in layers if name not in sparse]
            described["sparsity_config"] = _describe_sparse(sparse, others, left)
        if not by_scheme:
            return described
        single = len(by_scheme) == 1 and not sparse
        config_groups = {
            f"group_{index}": {"targets": ["Linear"] if single else names, **json.loads(scheme)}
            for index, (scheme, names) in enumerate(by_scheme.items())
        }
        formats = {group["format"] for group in config_groups.values()}
        return {
            **described,
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": config_groups,
            "ignore": left,
        }


def _is_float24(layer: CompressedLinear) -> bool:
    return isinstance(layer, Sparse24Linear) and layer.weights == "float"


def _sparse_tensors(layer: Sparse24Linear) -> dict[str, Tensor]:
    if layer.weights == "float":
        return sparse24_bitmask.write(layer.values, layer.metadata)
    if layer.weights == "int4":
        return ct.write_packed(PackedWeight.from_sparse(layer))
    return {
        "weight": sparse24_decompress(layer.values, layer.metadata),
        "weight_scale": layer.weight_scale.unsqueeze(1),
    }


def _describe_sparse(sparse: list[str], others: list[str], left: list[str]) -> dict[str, Any]:
    """The ``sparsity_config``, its layers by class where they are all that is compressed."""
    return {
        "format": sparse24_bitmask.FORMAT,
        "targets": sparse if others else ["Linear"],
        "ignore": left,
        "sparsity_structure": "2:4",
        "global_sparsity": 0.5,
        "registry_requires_subclass": False,
    }


def _scheme(group: str, entry: Any, default_format: Any) -> Scheme:
    where = f"quantization_config: {group}"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("weights"), Mapping):
        raise ValueError(f"{where} does not say how weights are quantized")
    stored = entry.get("format") or default_format
    if stored not in (PACKED, INT8, NAIVE):
        raise ValueError(f"{where} has format {stored!r}; read are {PACKED!r} and {INT8!r}")
    weights = entry["weights"]
    if str(weights.get("type", "int")).lower() != "int":
        raise ValueError(f"{where} has weights of type {weights['type']!r}; read is 'int'")
    strategy = weights.get("strategy") or ("channel" if weights.get("group_size") is None else "")
    if strategy not in ("group", "channel", "tensor", ""):
        raise ValueError(f"{where} has weights of strategy {strategy!r}, which is not read")
    if entry.get("output_activations"):
        raise ValueError(f"{where} quantizes output activations, which is not read")
    bits = config_bits(weights, "num_bits")
    activations = _activations(where, entry.get("input_activations"))
    packed = stored == PACKED
    symmetric = bool(weights.get("symmetric", True))
    by_group = strategy in ("group", "")
    if packed and activations is not None:
        raise ValueError(f"{where}: packed weights with quantized activations are not read")
    if not packed and bits != 8:
        raise ValueError(f"{where}: {stored} weights of {bits} bits are not read, only of 8")
    if activations is not None and (by_group or not symmetric):
        raise ValueError(
            f"{where}: with int8 activations weights are read if symmetric, and of strategy "
            "'channel' or 'tensor'"
        )
    return Scheme(
        targets=tuple(map(str, entry.get("targets") or ())),
        packed=packed,
        bits=bits,
        group_size=config_group_size(weights, "group_size") if by_group else -1,
        symmetric=symmetric,
        activations=None if activations is None else str(activations["strategy"]),
        dynamic=activations is not None and bool(activations.get("dynamic", False)),
    )


def _activations(where: str, entry: Any) -> Mapping[str, Any] | None:
    if not entry:
        return None
    accepted = {
        "num_bits": (8,),
        "type": ("int",),
        "symmetric": (True,),
        "strategy": ("token", "tensor"),
        "dynamic": (True, False),
    }
    for name, values in accepted.items():
        default = {"type": "int", "symmetric": True, "dynamic": False}.get(name)
        if entry.get(name, default) not in values:
            raise ValueError(
                f"{where}: input_activations with {name} = {entry.get(name)!r} are not read, "
                f"only with {' or '.join(map(repr, values))}"
            )
    if entry["strategy"] == "token" and not entry.get("dynamic", False):
        raise ValueError(f"{where}: static scales for every token are not read")
    result: Mapping[str, Any] = entry
    return result


def _describe(layer: CompressedLinear) -> dict[str, Any]:
    """A scheme without its targets."""
    if isinstance(layer, Int8Linear):
        tensorwise = layer.activations == "per_tensor"
        return {
            "format": INT8,
            "weights": _numbers(8, "tensor" if layer.weights == "per_tensor" else "channel"),
            "input_activations": {
                **_numbers(8, "tensor" if tensorwise else "token"),
                "dynamic": not layer.static_activations,
            },
        }
    if isinstance(layer, Sparse24Linear) and layer.weights == "int8":
        return {
            "format": INT8,
            "weights": _numbers(8, "channel"),
            "input_activations": {**_numbers(8, "token"), "dynamic": True},
        }
    bits, size, symmetric, permuted = 8, -1, True, False
    if isinstance(layer, Int4Linear):
        bits, size = layer.bits, layer.group_size
        symmetric, permuted = layer.zeros is None, layer.perm is not None
    elif isinstance(layer, Sparse24Linear):
        bits, size, symmetric = layer.bits, layer.group_size, layer.zeros is None
    weights = _numbers(bits, "channel" if size == -1 else "group", symmetric=symmetric)
    if size != -1:
        weights["group_size"] = size
    if permuted:
        weights["actorder"] = "group"
    return {"format": PACKED, "weights": weights, "input_activations": None}


def _numbers(bits: int, strategy: str, *, symmetric: bool = True) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "dynamic": False,
    }


def _as_packed(layer: Int8MixedLinear) -> PackedWeight:
    q = (layer.qweight.to(torch.int16) + 128).to(torch.uint8)
    scales = layer.weight_scale.unsqueeze(1)
    return PackedWeight(int4_pack(q, 8), scales, None, None, layer.in_features, 8, -1)


def _is_sparse24(config: Any) -> bool:
    """Whether there are 2:4 layers; ValueError for sparsity of another kind."""
    if not config:
        return False
    stored = config.get("format", "dense") if isinstance(config, Mapping) else config
    if stored in ("dense", None):
        return False
    if stored != sparse24_bitmask.FORMAT or not isinstance(config, Mapping):
        raise ValueError(
            f"compressed-tensors with a sparsity_config of format {stored!r} is not read, only "
            f"{sparse24_bitmask.FORMAT!r}"
        )
    structure = config.get("sparsity_structure", "2:4")
    if structure != "2:4":
        raise ValueError(
            f"quantization_config: sparsity_structure {structure!r} is not read, only '2:4'"
        )
    return True
