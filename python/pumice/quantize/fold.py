"""Where a scale of a layer's input channels can be hidden: in what produces them.

For any positive s, W x = (W · diag(s)) (x / s). The division costs nothing if a module before the
layer can do it by having its own weights divided: a norm, whose gain is divided; or a linear layer
whose outputs reach this layer through operations that commute with a positive scale for each
channel (the "up" branch of a gated MLP, values under attention weights, a ReLU).

Which module that is, is not looked up in a list of architectures. Candidates are found by running
the block and seeing what ran before, and each is *tried*: scaled by random powers of two, which are
exact in floating point, it must leave the block's output as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pumice.calibration import Block
from pumice.calibration.comm import smallest
from pumice.calibration.inputs import output_of


@dataclass(frozen=True)
class Fold:
    """A module of a block that can divide the input of some linear layers.

    Attributes:
        producer: its name within the block.
        consumers: all linear layers of the block that read its output, by name.
        kind: "norm" (weight / s), "unit norm" (a weight stored as gain - 1), "linear" (rows / s).
        heads, width: for values that several query heads share (GQA): the layer's input is
            ``heads`` copies of each run of ``width`` of the producer's outputs. Otherwise 1 and 0.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: str
    heads: int = 1
    width: int = 0

    def tied(self, per_channel: Tensor) -> Tensor:
        """The mean over channels that must have the same scale: one value for each output."""
        if self.heads == 1:
            return per_channel
        return per_channel.reshape(-1, self.heads, self.width).mean(1).flatten()

    def spread(self, scale: Tensor) -> Tensor:
        """One scale for each output of the producer to one for each channel of the input."""
        if self.heads == 1:
            return scale
        groups = scale.reshape(-1, 1, self.width)
        return groups.expand(-1, self.heads, -1).flatten()

    def apply(self, module: nn.Module, scale: Tensor) -> None:
        """Divide the producer's outputs by ``scale`` and multiply the consumers' columns by it."""
        with torch.no_grad():
            producer = module.get_submodule(self.producer)
            weight = producer.weight
            assert isinstance(weight, Tensor)
            gain = weight.float()
            if self.kind == "norm":
                gain = gain / scale
            elif self.kind == "unit norm":
                gain = (gain + 1) / scale - 1
            else:
                gain = gain / scale[:, None]
            weight.copy_(gain)
            bias = getattr(producer, "bias", None)
            if isinstance(bias, Tensor):
                bias.copy_(bias.float() / scale)
            wide = self.spread(scale)
            for name in self.consumers:
                consumer = module.get_submodule(name)
                assert isinstance(consumer, nn.Linear)
                consumer.weight.copy_(consumer.weight.float() * wide)


class FoldFinder:
    """Finds folds; remembers them, for blocks of one class are alike."""

    def __init__(self) -> None:
        self._known: dict[object, Fold | None] = {}

    def find(self, block: Block, names: tuple[str, ...]) -> Fold | None:
        """The fold for layers that share an input, or None where there is none."""
        key = (type(block.module), names, tuple(block.layers[n].weight.shape for n in names))
        if key not in self._known:
            self._known[key] = self._search(block, names)
        return self._known[key]

    def _search(self, block: Block, names: tuple[str, ...]) -> Fold | None:
        trace = _trace(block)
        if any(name not in trace.inputs for name in names):
            return None
        expected = trace.output
        for fold in _candidates(block, trace, names):
            with _restored(block, fold):
                features = block.module.get_submodule(fold.producer).weight.shape[0]  # type: ignore
                generator = torch.Generator().manual_seed(0)
                powers = torch.randint(-1, 2, (int(features),), generator=generator)
                fold.apply(block.module, torch.exp2(powers.float()).to(block.device))
                found = output_of(block.run(0), block.name)
            difference = (found.float() - expected.float()).norm()
            same = bool(difference <= 1e-3 * expected.float().norm())
            if smallest(int(same)):
                return fold
        return None


@dataclass
class _Trace:
    """One run of a block: what each module got and gave, in the order they finished."""

    output: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def _trace(block: Block) -> _Trace:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in block.module.named_modules():
        if any(True for _ in module.children()):
            continue

        def hook(
            module: nn.Module, args: tuple[object, ...], output: object, name: str = name
        ) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                inputs[name], outputs[name] = args[0], output

        handles.append(module.register_forward_hook(hook))
    try:
        output = output_of(block.run(0), block.name)
    finally:
        for handle in handles:
            handle.remove()
    return _Trace(output, inputs, outputs)


def _candidates(block: Block, trace: _Trace, names: Sequence[str]) -> Iterator[Fold]:
    x = trace.inputs[names[0]]
    features = x.shape[-1]
    modules = dict(block.module.named_modules())
    consumers = tuple(
        name
        for name, seen in trace.inputs.items()
        if isinstance(modules[name], nn.Linear) and _same_memory(seen, x)
    )
    before = list(trace.outputs)[: list(trace.outputs).index(names[0])]
    for name in reversed(before):
        weight = getattr(modules[name], "weight", None)
        if not isinstance(weight, Tensor) or name in consumers:
            continue
        if weight.dim() == 1 and len(weight) == features and _same_memory(trace.outputs[name], x):
            yield Fold(name, consumers, "norm")
            yield Fold(name, consumers, "unit norm")
    for name in reversed(before):
        producer = modules[name]
        if not isinstance(producer, nn.Linear) or name in consumers:
            continue
        if producer.out_features == features:
            yield Fold(name, consumers, "linear")
        width = _head_width(block.module, name)
        if width and features % producer.out_features == 0 and producer.out_features % width == 0:
            heads = features // producer.out_features
            if heads > 1:
                yield Fold(name, consumers, "linear", heads, width)


def _head_width(module: nn.Module, name: str) -> int:
    """What the attention module that holds a layer says is the width of a head; 0 if it doesn't."""
    parent = module.get_submodule(name.rpartition(".")[0])
    width = getattr(parent, "head_dim", 0)
    return width if isinstance(width, int) else 0


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """One tensor, or a view of all of it (a reshape lies between a norm and its layer)."""
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


@contextmanager
def _restored(block: Block, fold: Fold) -> Iterator[None]:
    """Undo in the end what is done to the modules of a fold."""
    names = (fold.producer, *fold.consumers)
    saved = {name: copy.deepcopy(block.module.get_submodule(name).state_dict()) for name in names}
    try:
        yield
    finally:
        for name, state in saved.items():
            block.module.get_submodule(name).load_state_dict(state)
