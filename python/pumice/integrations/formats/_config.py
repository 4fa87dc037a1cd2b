"""Entries of a ``quantization_config``, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pumice.nn import CompressedLinear
from pumice.ops._int4_checks import BITS, GROUP_MULTIPLE


def config_bits(config: Mapping[str, Any], name: str) -> int:
    bits = config.get(name)
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"quantization_config: {name} must be one of {BITS}, not {bits!r}")
    return bits


def config_group_size(config: Mapping[str, Any], name: str) -> int:
    size = config.get(name)
    if not isinstance(size, int) or isinstance(size, bool):
        raise ValueError(f"quantization_config: {name} must be an integer, not {size!r}")
    if size != -1 and (size < GROUP_MULTIPLE or size % GROUP_MULTIPLE):
        raise ValueError(
            f"quantization_config: {name} is {size}; read are -1 (whole rows) and multiples of "
            f"{GROUP_MULTIPLE}"
        )
    return size


def the_same(layers: Mapping[str, CompressedLinear], attribute: str, format_name: str) -> Any:
    """The value that all layers have; ValueError, naming two, where they differ."""
    first: tuple[str, Any] | None = None
    for name, layer in layers.items():
        value = getattr(layer, attribute, None)
        if first is None:
            first = (name, value)
        elif value != first[1]:
            raise ValueError(
                f"{format_name} has one {attribute} for all layers, but that of {first[0]!r} is "
                f"{first[1]} and that of {name!r} is {value}; write format='compressed-tensors'"
            )
    assert first is not None
    return first[1]
