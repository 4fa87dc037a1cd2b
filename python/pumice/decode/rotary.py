"""How a model turns its queries and keys: found out by looking, not by names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pumice.decode.model import PagedModel, look

__all__ = ["Rotary", "find_rotary"]

# Where the model's own rotation is looked at. The last is beyond any trained context, where an
# encoding whose frequencies depend on the length gives itself away.
_POSITIONS = (1, 3, 2**17)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al., 2021): pair i is turned by ``inv_freq[i] · position``.

    ``inv_freq``: float64 [D_rot / 2], on the CPU. Angles are formed in float64: in float32, as
    models do it, p · inv_freq is off by p · 2^-24, which is a radian from p = 10^7 on.
    ``interleaved``: pairs are elements 2i and 2i + 1, else i and i + D_rot/2.
    """

    inv_freq: Tensor
    interleaved: bool

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), fp32 [T, D_rot / 2] each, where the positions, int64 [T], are."""
        turns = positions.double()[:, None] * self.inv_freq.to(positions.device)
        return turns.cos().float(), turns.sin().float()

    def rotate(self, states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """states [T, H, D], token t turned by row t of the angles; fp32, rounded once."""
        cos, sin = (table[:, None] for table in angles)
        size = 2 * cos.shape[-1]
        turned = states[..., :size].float()
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = turned.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        turned = turned.to(states.dtype)
        return turned if size == states.shape[-1] else torch.cat([turned, states[..., size:]], -1)


def find_rotary(model: PagedModel) -> list[Rotary | None]:
    """The rotation of each layer; None where a layer knows no positions.

    One token is run through the model at a few positions. Queries and keys of every layer must be
    those of position 0 turned by ``inv_freq · position``, for a buffer ``inv_freq`` that some
    module of the model has, in pairs of one kind or the other.

    Raises:
        NotImplementedError: positions have another effect than that, such as learned or ALiBi
            encodings, and frequencies or scales that depend on the length (dynamic NTK, longrope).
    """
    name = type(model.model).__name__
    _refuse_by_name(model, name)
    candidates: list[Rotary | None] = [None]
    for frequencies in _frequencies(model.model):
        candidates += [Rotary(frequencies, interleaved) for interleaved in (False, True)]
    token = min(1, model.geometry.vocab_size - 1)
    start = look(model, token)[0]
    fitting = [list(candidates) for _ in start]
    try:
        for position in _POSITIONS:
            there = look(model, token, position)[0]
            for layer, (before, after) in enumerate(zip(start, there, strict=True)):
                fitting[layer] = [
                    rotary
                    for rotary in fitting[layer]
                    if all(
                        _explains(rotary, position, *pair)
                        for pair in zip(before[:2], after[:2], strict=True)
                    )
                ]
            if not all(fitting):
                break
    except IndexError:  # a table of learned positions ends somewhere
        fitting = [[]]
    finally:
        look(model, token)  # what has grown its frequencies shrinks them again
    if not all(fitting):
        raise NotImplementedError(
            f"{name}: queries and keys of layer {fitting.index([])} at other positions are not "
            "those at position 0 turned by rotary embeddings of fixed frequencies (inv_freq); "
            "streaming relies on that"
        )
    return [rotaries[0] for rotaries in fitting]


def _explains(rotary: Rotary | None, position: int, before: Tensor, after: Tensor) -> bool:
    """Whether states [1, H, D] at a position are those at 0, turned."""
    if rotary is not None:
        if 2 * len(rotary.inv_freq) > before.shape[-1]:
            return False
        at = torch.tensor([position], device=before.device)
        before = rotary.rotate(before, rotary.angles(at))
    rounding = 4 * torch.finfo(after.dtype).eps + position * 2.0**-22
    error = (after.float() - before.float()).norm()
    return bool(error <= max(1e-4, rounding) * after.float().norm())


def _frequencies(model: Any) -> list[Tensor]:
    """The different buffers named …inv_freq, float64."""
    found: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1:
            frequencies = buffer.detach().double().cpu()
            if not any(torch.equal(frequencies, other) for other in found):
                found.append(frequencies)
    return found


def _refuse_by_name(model: PagedModel, name: str) -> None:
    for module in model.model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in ("dynamic", "longrope"):
                raise NotImplementedError(
                    f"{name}: rotary embeddings of type {kind!r} turn all keys anew as the text "
                    "grows, but a stream keeps keys as they are; streaming needs fixed frequencies "
                    "(default, linear, yarn, llama3)"
                )
