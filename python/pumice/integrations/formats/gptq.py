"""GPTQ checkpoints (AutoGPTQ, GPTQModel), versions 1 and 2; 2, 3, 4 and 8 bits.

A layer of K inputs and N outputs in groups of g inputs, G = ceil(K / g), is stored as::

    qweight  int32 [ceil(K·b/32), N]   column n is a little-endian bit stream of q[n, 0 … K-1]:
                                       value k at bit k·b. 4 bits: k = 8r + j at bit 4j of word r.
                                       3 bits: 32 values over 3 words, two of them across words.
    qzeros   int32 [G, ceil(N·b/32)]   row g is such a stream of the zero points of N outputs,
                                       version 1: z - 1       (symmetric, 4 bits: 0x77777777)
                                       version 2: z           (symmetric, 4 bits: 0x88888888)
    scales   floating [G, N]
    g_idx    int32 [K]                 the group of each input; activation order scatters them
    W[n, k] = (q[n, k] - z[g, n]) · scales[g, n]                     g = g_idx[k]

``qweight`` is thus the transpose of ours. The configuration says which version it is, and can be
wrong: writers are known to mark version 2 as "gptq". A layer declared symmetric whose zero points
are all alike tells by their value, and that decides.

Version 1 cannot hold z = 0: it would store -1, and what writers made of that differs (some wrap
around, some spoil the neighbours in the word). Such a file is refused, and not written either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pumice.integrations.formats._config import config_bits, config_group_size, the_same
from pumice.integrations.formats._layer import (
    INTEGERS,
    check_device,
    refuse_others,
    take,
    take_scales,
)
from pumice.integrations.formats._packed import (
    PackedWeight,
    groups,
    middle_or_zeros,
    sequential_groups,
    words,
)
from pumice.nn import CompressedLinear, Int4Linear
from pumice.ops import int4_pack, int4_unpack

QUANT_METHOD = "gptq"
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
_VERSIONS = {"gptq": 1, "gptq_v2": 2}


def read(
    tensors: Mapping[str, Tensor],
    *,
    k: int,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    version: int = 1,
    layer: str = "",
) -> PackedWeight:
    """One layer's tensors, as listed above, in our packing.

    Args:
        tensors: by name; ``g_idx`` may be left out where groups are neighbours.
        k: inputs; the packed shape does not tell them exactly.
        bits, group_size: as in the configuration; group_size -1 is K.
        symmetric, version: as declared. If symmetric, values that are all 2^(b-1) - 1 are version
            1, all 2^(b-1) are version 2, whatever is declared.
        layer: a name for messages.

    Raises:
        ValueError: a tensor missing, unknown, of a wrong shape or dtype, on another device than the
            rest; g_idx beyond the groups; scales not finite; a zero point of version 1 that
            overflows. The tensor is named.
    """
    refuse_others(tensors, TENSORS, layer)
    check_device(tensors, layer)
    n = tensors["qweight"].shape[-1] if "qweight" in tensors else 0
    count = groups(k, group_size)
    why = f"{bits} bits, {k} inputs, groups of {group_size}"
    qweight = take(tensors, "qweight", layer, (torch.int32,), (words(k, bits), n), why)
    qzeros = take(tensors, "qzeros", layer, (torch.int32,), (count, words(n, bits)), why)
    scales = take_scales(tensors, "scales", layer, (count, n), why)
    stored = int4_unpack(qzeros.contiguous(), n, bits)
    zeros = _zeros(stored, bits, symmetric, version, f"{layer}.qzeros")
    return PackedWeight(
        _clear_padding(qweight.T.contiguous(), k, bits),
        scales.T.contiguous(),
        middle_or_zeros(zeros.T, bits),
        _read_g_idx(tensors, k, count, group_size, layer),
        k,
        bits,
        group_size,
    )


def write(weight: PackedWeight, *, version: int = 1) -> dict[str, Tensor]:
    """The inverse of :func:`read`.

    Raises:
        ValueError: fractional zero points; a zero point of 0, which version 1 cannot hold.
    """
    zeros = weight.full_zeros()
    if version == 1:
        if bool((zeros == 0).any()):
            raise ValueError(
                "it has zero points of 0, which version 1 of GPTQ cannot hold (it stores z - 1); "
                "write format='gptq_v2'"
            )
        zeros = zeros - 1
    return {
        "qweight": weight.qweight.T.contiguous(),
        "qzeros": int4_pack(zeros.T.contiguous(), weight.bits),
        "scales": weight.scales.T.contiguous(),
        "g_idx": weight.full_g_idx(),
    }


def _zeros(stored: Tensor, bits: int, symmetric: bool, version: int, name: str) -> Tensor:
    """The zero points behind the stored ones, uint8 [G, N]."""
    middle = 1 << (bits - 1)
    if symmetric and bool((stored == middle - 1).all()):
        version = 1
    elif symmetric and bool((stored == middle).all()):
        version = 2
    if version == 2:
        return stored
    if bool((stored == (1 << bits) - 1).any()):
        raise ValueError(
            f"{name!r} stores {(1 << bits) - 1}, which in version 1 means a zero point of "
            f"{1 << bits}, beyond {bits} bits: either it was 0 and wrapped around when it was "
            "written, or the file is version 2 and not marked so (checkpoint_format 'gptq_v2')"
        )
    return stored + 1


def _read_g_idx(
    tensors: Mapping[str, Tensor], k: int, count: int, group_size: int, layer: str
) -> Tensor | None:
    if "g_idx" not in tensors:
        return None
    g_idx = take(tensors, "g_idx", layer, INTEGERS, (k,), f"{k} inputs")
    return checked_g_idx(g_idx, k, count, group_size, f"{layer}.g_idx")


def checked_g_idx(g_idx: Tensor, k: int, count: int, group_size: int, name: str) -> Tensor | None:
    """int32 [K], or None where groups are neighbours; ValueError for a group that is not there."""
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= count:
        raise ValueError(
            f"{name!r} names group {low if low < 0 else high}, but there are {count} groups"
        )
    g_idx = g_idx.to(torch.int32)
    same = torch.equal(g_idx, sequential_groups(k, group_size, g_idx.device))
    return None if same else g_idx.contiguous()


def _clear_padding(qweight: Tensor, k: int, bits: int) -> Tensor:
    """Bits beyond the last value are zero in our packing; others do not say what theirs are."""
    used = k * bits % 32
    if not used:
        return qweight
    cleared = qweight.clone()  # the transpose of a single column is the caller's memory
    cleared[:, -1] &= (1 << used) - 1
    return cleared


@dataclass(frozen=True)
class _Settings:
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool


class Reader:
    """Layers of a GPTQ checkpoint, as its ``quantization_config`` describes them.

    Read from it: bits, group_size, sym, desc_act, checkpoint_format ("gptq" or "gptq_v2") and
    GPTQModel's ``dynamic``, settings for the layers whose name matches a pattern.
    """

    markers: tuple[str, ...] = ("qweight",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        stored_as = config.get("checkpoint_format", "gptq")
        if stored_as not in _VERSIONS:
            raise ValueError(
                f"GPTQ's checkpoint_format {stored_as!r} is not read, only {sorted(_VERSIONS)}"
            )
        if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise ValueError(f"GPTQ's pack_dtype {config['pack_dtype']!r} is not read, only int32")
        self._version = _VERSIONS[stored_as]
        self._config = dict(config)
        self._settings(config)  # to fail early
        self._dynamic: dict[str, Any] = dict(config.get("dynamic") or {})

    def make_layer(
        self, name: str, linear: nn.Linear, tensors: Mapping[str, Tensor]
    ) -> CompressedLinear:
        settings = self._settings({**self._config, **self._override(name)})
        if settings.act_order and "g_idx" not in tensors:
            raise ValueError(f"'{name}.g_idx' is missing, but the configuration says desc_act")
        weight = read(
            tensors,
            k=linear.in_features,
            bits=settings.bits,
            group_size=settings.group_size,
            symmetric=settings.symmetric,
            version=self._version,
            layer=name,
        )
        return weight.to_layer(linear)

    def _override(self, name: str) -> dict[str, Any]:
        for pattern, settings in self._dynamic.items():
            if re.match(pattern.removeprefix("+:"), name):
                return dict(settings)
        return {}

    @staticmethod
    def _settings(config: Mapping[str, Any]) -> _Settings:
        return _Settings(
            config_bits(config, "bits"),
            config_group_size(config, "group_size"),
            bool(config.get("sym", True)),
            bool(config.get("desc_act", False)),
        )


class Writer:
    """A model's layers as a GPTQ checkpoint, which has one number of bits and one group size."""

    def __init__(self, version: int) -> None:
        self._version = version

    def write_layer(self, name: str, layer: CompressedLinear) -> dict[str, Tensor]:
        if not isinstance(layer, Int4Linear):
            raise ValueError(f"GPTQ holds Int4Linear layers only, not a {type(layer).__name__}")
        return write(PackedWeight.from_layer(layer), version=self._version)

    def describe(self, layers: Mapping[str, CompressedLinear], left: list[str]) -> dict[str, Any]:
        """The ``quantization_config``; ``left`` are the linear layers that are not compressed."""
        config: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "bits": the_same(layers, "bits", "GPTQ"),
            "group_size": the_same(layers, "group_size", "GPTQ"),
            "sym": all(getattr(layer, "zeros", None) is None for layer in layers.values()),
            "desc_act": any(getattr(layer, "perm", None) is not None for layer in layers.values()),
            "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[self._version],
            "pack_dtype": "int32",
            "lm_head": any(name.split(".")[-1] == "lm_head" for name in layers),
        }
        if kept := [name for name in left if name.split(".")[-1] != "lm_head"]:
            config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in kept}
        return config
