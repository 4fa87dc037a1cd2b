"""The formats by name: what a ``quantization_config`` asks for, and what a user may."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from pumice.integrations.formats import awq, gptq, schemes
from pumice.nn import CompressedLinear


class Reader(Protocol):
    """Makes the layers of one checkpoint. Made from its ``quantization_config``, checked."""

    markers: tuple[str, ...]  # of these tensors every compressed layer has one

    def make_layer(
        self, name: str, linear: nn.Linear, tensors: Mapping[str, Tensor]
    ) -> CompressedLinear:
        """The layer in the place of ``linear``, from its tensors but the bias; else ValueError."""


class Writer(Protocol):
    """Gives the tensors and the configuration of one checkpoint."""

    def write_layer(self, name: str, layer: CompressedLinear) -> dict[str, Tensor]:
        """The tensors of a layer but its bias; ValueError if the format has no place for it."""

    def describe(self, layers: Mapping[str, CompressedLinear], left: list[str]) -> dict[str, Any]:
        """The ``quantization_config``; ``left`` are the linear layers that are not compressed."""


# By quantization_config["quant_method"].
READERS: dict[str, Callable[[Mapping[str, Any]], Reader]] = {
    gptq.QUANT_METHOD: gptq.Reader,
    awq.QUANT_METHOD: awq.Reader,
    schemes.QUANT_METHOD: schemes.Reader,
}

# By the name that pumice.save takes.
FORMATS: dict[str, Callable[[], Writer]] = {
    "gptq": lambda: gptq.Writer(version=1),
    "gptq_v2": lambda: gptq.Writer(version=2),
    "awq": awq.Writer,
    "compressed-tensors": schemes.Writer,
}


def make_reader(config: Mapping[str, Any]) -> Reader:
    """The reader that a ``quantization_config`` asks for; ValueError for an unknown one."""
    method = config.get("quant_method")
    if method not in READERS:
        raise ValueError(
            f"quantization_config: quant_method {method!r} is not read, only "
            f"{', '.join(sorted(READERS))}"
        )
    return READERS[method](config)


def make_writer(name: str) -> Writer:
    if name not in FORMATS:
        raise ValueError(
            f"save: format {name!r} is not one of pumice, {', '.join(sorted(FORMATS))}"
        )
    return FORMATS[name]()
