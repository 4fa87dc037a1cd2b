"""The inputs of the blocks, for every calibration sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pumice._calibrate import call, not_a_sample
from pumice.calibration.stack import Stack


class _Activations:
    """Stands in a block's arguments for the activations that go from block to block."""


class Unknown:
    """Not known yet."""


ACTIVATIONS = _Activations()


@dataclass
class Call:
    """The arguments of one call of a block, the activations left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class BlockInputs:
    """What the blocks are called with.

    Attributes:
        activations: one tensor for each sample: the output of the last block run.
        calls: for each sample, for each block, the rest of its arguments (masks, rotary tables).
        token_masks: for each sample, which tokens count (bool [batch, tokens]), or None for all.
    """

    activations: list[Tensor | None] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    token_masks: list[Tensor | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.calls)

    def run(self, index: int, block: int, module: nn.Module, device: torch.device) -> Any:
        """Run a block on one sample; returns whatever it returns.

        It gets a copy of its activations (the model as a whole: of its inputs), for it may write
        into what it is given.
        """
        hidden = self.activations[index]

        def place(value: Any) -> Any:
            if value is ACTIVATIONS:
                assert hidden is not None
                return hidden.to(device, copy=True)
            return value.to(device, copy=hidden is None) if isinstance(value, Tensor) else value

        arguments = self.calls[index][block]
        args = map_structure(place, arguments.args)
        return module(*args, **map_structure(place, arguments.kwargs))


def capture(
    model: nn.Module, stack: Stack, calibration: Iterable[Any], store: torch.device | None
) -> BlockInputs:
    """Run the model up to its blocks on every sample, and keep what they are called with.

    The blocks themselves do not run (save the first, once, to see what it returns): each hands its
    input on, so that all of them are called with the arguments that are theirs, and the last one
    ends the run before the output layer.

    Args:
        model: in evaluation mode.
        stack: its blocks; the model as a whole gets the samples as they are.
        calibration: see :func:`pumice.compress`.
        store: device to keep activations on; None: where they are.

    Raises:
        ValueError: no samples; or the model does something between its blocks.
    """
    inputs = BlockInputs()
    keep = _Keeper(store)
    tail: tuple[Any, ...] | Unknown | None = Unknown()
    for sample in calibration:
        inputs.token_masks.append(_token_mask(sample))
        if stack.is_whole_model:
            args, kwargs = _as_call(sample)
            inputs.calls.append([Call(keep(args), keep(kwargs))])
            inputs.activations.append(None)
            continue
        recorder = _Recorder(stack, keep, tail)
        with recorder.in_place_of_blocks(), _without_cache(model):
            try:
                call(model, sample)
            except _AllBlocksSeen:
                pass
            else:
                raise ValueError(
                    f"calibration: the forward pass of {type(model).__name__} does not call all "
                    f"of the blocks {stack.name!r}, so they cannot be calibrated one after the "
                    'other; pass blocks="" to calibrate the model as a whole'
                )
        tail = recorder.tail
        inputs.calls.append(recorder.calls)
        inputs.activations.append(keep(recorder.first))
        keep.end_of_sample()
    if not inputs.calls:
        raise ValueError("compress: calibration is empty; pass at least one input")
    return inputs


def output_of(result: Any, name: str) -> Tensor:
    """The activations in what a block returned."""
    hidden = result[0] if isinstance(result, (tuple, list)) and result else result
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"calibration: block {name!r} returns a {type(result).__name__}, not activations or a "
            'tuple that begins with them; pass blocks="" to calibrate the model as a whole'
        )
    return hidden


def map_structure(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the leaves of nested tuples, lists and dicts."""
    if isinstance(value, Mapping):
        return {key: map_structure(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_structure(function, item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_structure(function, item) for item in value)
    return function(value)


class _AllBlocksSeen(Exception):  # noqa: N818 (no error: it ends a forward pass early)
    pass


class _Recorder:
    """Takes the place of the blocks' forward for one pass of the model."""

    def __init__(self, stack: Stack, keep: _Keeper, tail: tuple[Any, ...] | Unknown | None) -> None:
        self.calls: list[Call] = []
        self.first: Tensor | None = None
        # What a block returns beside its activations; None where it returns those alone.
        self.tail = tail
        self._stack = stack
        self._keep = keep
        self._passed_on: Tensor | None = None

    @contextmanager
    def in_place_of_blocks(self) -> Iterator[None]:
        patched = []
        try:
            for index, (name, block) in enumerate(self._stack.blocks.items()):
                patched.append((block, vars(block).get("forward")))
                block.forward = self._stub(index, name, block.forward)
            yield
        finally:
            for block, own in patched:
                del block.forward
                if own is not None:
                    block.forward = own

    def _stub(self, index: int, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stub(*args: Any, **kwargs: Any) -> Any:
            hidden, arguments = _take_activations(name, args, kwargs)
            if index != len(self.calls) or (index and hidden is not self._passed_on):
                raise ValueError(
                    f"calibration: the model changes the activations before block {name!r}, or "
                    'calls its blocks in another order; pass blocks="" to calibrate it as a whole'
                )
            self.calls.append(Call(self._keep(arguments.args), self._keep(arguments.kwargs)))
            if not index:
                self.first = hidden
            if len(self.calls) == len(self._stack.blocks):
                raise _AllBlocksSeen
            if isinstance(self.tail, Unknown):
                copied = [hidden.clone() if value is hidden else value for value in args]
                named = {k: hidden.clone() if v is hidden else v for k, v in kwargs.items()}
                self.tail = _tail_of(name, forward(*copied, **named))
            self._passed_on = hidden
            return hidden if self.tail is None else (hidden, *self.tail)

        return stub


def _tail_of(name: str, result: Any) -> tuple[Any, ...] | None:
    output_of(result, name)
    if isinstance(result, Tensor):
        return None
    tail = tuple(result[1:])
    if any(isinstance(value, Tensor) for value in tail):
        raise ValueError(
            f"calibration: block {name!r} hands more than its activations to the next block; pass "
            'blocks="" to calibrate the model as a whole'
        )
    return tail


def _take_activations(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Call]:
    """The activations among a block's arguments, and the arguments with a mark in their place."""
    if args and isinstance(args[0], Tensor):
        return args[0], Call((ACTIVATIONS, *args[1:]), kwargs)
    hidden = kwargs.get("hidden_states")
    if isinstance(hidden, Tensor):
        return hidden, Call(args, {**kwargs, "hidden_states": ACTIVATIONS})
    raise ValueError(
        f"calibration: block {name!r} is not called with its activations as first argument (or "
        'hidden_states=); pass blocks="" to calibrate the model as a whole'
    )


class _Keeper:
    """Moves what is kept to its place, and keeps equal tensors once.

    Samples of one length share their masks and rotary tables; blocks share them always.
    """

    def __init__(self, store: torch.device | None) -> None:
        self._store = store
        # The original is held beside the copy, for an id is of use only as long as its object.
        self._by_id: dict[int, tuple[Tensor, Tensor]] = {}
        self._by_form: dict[Any, Tensor] = {}

    def __call__(self, value: Any) -> Any:
        return map_structure(self._leaf, value)

    def end_of_sample(self) -> None:
        self._by_id.clear()

    def _leaf(self, value: Any) -> Any:
        if hasattr(value, "get_seq_length"):  # a key-value cache would grow at each run
            return None
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._by_id:
            self._by_id[id(value)] = value, self._moved(value)
        return self._by_id[id(value)][1]

    def _moved(self, value: Tensor) -> Tensor:
        form = (value.shape, value.dtype, value.device)
        kept = self._by_form.get(form)
        if kept is not None and torch.equal(kept, value.to(kept.device)):
            return kept
        moved = value.detach().to(self._store) if self._store is not None else value.detach()
        self._by_form[form] = moved
        return moved


def _as_call(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(sample, Mapping):
        return (), dict(sample)
    if isinstance(sample, Tensor):
        return (sample,), {}
    if isinstance(sample, (tuple, list)):
        return tuple(sample), {}
    raise not_a_sample(sample)


def _token_mask(sample: Any) -> Tensor | None:
    """Which tokens are no padding, where the sample says so."""
    mask = sample.get("attention_mask") if isinstance(sample, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool((mask != 0).all()):
        return None
    return mask != 0


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """transformers models make a key-value cache unless their configuration says not to."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if before:
            config.use_cache = before  # type: ignore[union-attr]
