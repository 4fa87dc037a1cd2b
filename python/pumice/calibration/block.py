"""One block of a model while a method works on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pumice.calibration.comm import smallest
from pumice.calibration.inputs import BlockInputs, output_of
from pumice.calibration.statistics import Statistic
from pumice.nn._linear import weight_of

S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class SharedInput(Generic[S]):
    """Layers of a block that are given the same tensor, and what was collected of it.

    Attributes:
        names: within the block, in the order they run: of query, key and value, for example.
        statistic: over the tensor's rows.
    """

    names: tuple[str, ...]
    statistic: S


class Block:
    """A working copy of one block, on the device that computes.

    Methods change the copy; the model is left as it is. What they changed is handed over in the
    end: :attr:`replacements`.

    Attributes:
        name: qualified, "" for the model as a whole.
        module: the copy.
        layers: its layers that are to be compressed, by their name within the block.
        device: where it computes.
        replacements: what stands for modules of the model, by name within the block.
    """

    def __init__(
        self,
        name: str,
        index: int,
        module: nn.Module,
        layers: dict[str, nn.Linear],
        inputs: BlockInputs,
        device: torch.device,
    ) -> None:
        self.name = name
        self.module = module
        self.layers = layers
        self.device = device
        self.replacements: dict[str, nn.Module] = {}
        self.float_weights: dict[str, Tensor] = {}
        self.inputs = inputs
        self._index = index

    def full_name(self, name: str) -> str:
        """The qualified name of a module of this block."""
        return ".".join(part for part in (self.name, name) if part)

    def run(self, sample: int) -> Any:
        """The output of the working copy for one calibration sample."""
        return self.inputs.run(sample, self._index, self.module, self.device)

    def advance(self, start: int = 0, stop: int | None = None, *, keep: bool = True) -> None:
        """Run samples; their outputs become the next block's inputs, if ``keep``."""
        for sample in range(len(self.inputs))[start:stop]:
            result = self.run(sample)
            if keep:
                before = self.inputs.activations[sample]
                assert before is not None
                hidden = output_of(result, self.name).detach()
                self.inputs.activations[sample] = hidden.to(before.device)

    def collect(self, make: Callable[[str, nn.Linear], S]) -> list[SharedInput[S]]:
        """Run all samples and gather a statistic of each layer's inputs.

        Layers that are given the same tensor share one statistic: a third of the work and memory
        for query, key and value. Padding (zeros in a sample's ``attention_mask``) is left out.

        Args:
            make: an empty statistic for a layer.

        Raises:
            ValueError: a layer that no sample reaches.
        """
        collector = _Collector(self.layers, make)
        with collector.watching():
            for sample in range(len(self.inputs)):
                collector.begin(self.inputs.token_masks[sample])
                self.run(sample)
        for name in self.layers:
            if smallest(int(name in collector.leader)) == 0:
                raise self._no_data(name)
        groups: dict[str, list[str]] = {}
        for name in self.layers:
            groups.setdefault(collector.leader[name], []).append(name)
        shared = []
        for leader, names in groups.items():
            statistic = collector.statistics[leader].finish()
            if not statistic.tokens:  # called, but with no rows or nothing but padding
                raise self._no_data(leader)
            shared.append(SharedInput(tuple(names), statistic))
        return shared

    def _no_data(self, name: str) -> ValueError:
        return ValueError(
            f"layer {self.full_name(name)!r} received no calibration data (an expert that is "
            "never chosen?): use more data, or exclude it"
        )

    def replace(self, name: str, layer: nn.Module) -> None:
        """Hand over a finished layer; from now on the working copy computes with its weight.

        Args:
            name: of the layer it replaces.
            layer: a CompressedLinear, or an nn.Linear (of a pruned weight that is stored dense).
        """
        self.float_weights[name] = self.layers[name].weight.detach().clone()
        self.replacements[name] = layer
        self.use(name)

    def use(self, name: str) -> None:
        """Give the working copy the weight and bias that the replacement of that name has."""
        layer, linear = self.replacements[name], self.layers[name]
        with torch.no_grad():
            linear.weight.copy_(weight_of(layer, linear.weight.dtype))
            if isinstance(layer.bias, Tensor):
                linear.bias.copy_(layer.bias)

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Errors from within name the layer."""
        try:
            yield
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {self.full_name(name)!r}: {error}") from error

    def touch(self, *names: str) -> None:
        """Hand over modules of the working copy that were changed in place, such as a norm.

        Layers to be compressed are handed over when they are.
        """
        for name in names:
            if name not in self.layers:
                self.replacements[name] = self.module.get_submodule(name)


class _Collector(Generic[S]):
    def __init__(
        self, layers: Mapping[str, nn.Linear], make: Callable[[str, nn.Linear], S]
    ) -> None:
        self.statistics: dict[str, S] = {}
        # The layer whose statistic stands for each layer's: the first that got the same tensor.
        self.leader: dict[str, str] = {}
        self._layers = layers
        self._make = make
        self._mask: Tensor | None = None
        self._now: dict[str, Tensor] = {}  # the inputs of this forward pass
        self._calls: dict[str, int] = {}

    def watching(self) -> ExitStack:
        stack = ExitStack()
        for name, linear in self._layers.items():
            handle = linear.register_forward_pre_hook(self._hook(name))
            stack.callback(handle.remove)
        return stack

    def begin(self, mask: Tensor | None) -> None:
        self._mask = mask
        self._now.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(linear: nn.Linear, args: tuple[Any, ...]) -> None:
            x: Tensor = args[0]
            if name not in self.leader:
                # Both must be new in this very pass, or their sums would not be over the same rows.
                twin = next(
                    (
                        other
                        for other, seen in self._now.items()
                        if seen is x and self._calls[self.leader[other]] == 1
                    ),
                    None,
                )
                self.leader[name] = name if twin is None else self.leader[twin]
            leader = self.leader[name]
            again = name in self._now
            self._now[name] = x
            if leader == name:
                self._calls[name] = self._calls.get(name, 0) + 1
                if name not in self.statistics:
                    self.statistics[name] = self._make(name, linear)
                self.statistics[name].add(self._rows(x))
            elif again or self._now.get(leader) is not x:
                raise ValueError(
                    f"calibration: layers {name!r} and {leader!r} were given one input in the "
                    "first sample, but different ones in another; such a block cannot be "
                    "calibrated"
                )

        return hook

    def _rows(self, x: Tensor) -> Tensor:
        if self._mask is not None and x.shape[:-1] == self._mask.shape:
            return x.detach()[self._mask.to(x.device)]
        return x.detach().reshape(-1, x.shape[-1])
