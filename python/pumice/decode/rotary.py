"""How a model turns its queries and keys: found out by looking, not by names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pumice.decode.model import PagedModel, look

__all__ = ["Rotary", "find_rotary", "steady_length"]

# transformers' names of frequencies that are the same in texts of any length.
_FIXED = {None, "default", "linear", "yarn", "llama3"}


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


def find_rotary(model: PagedModel, length: int) -> list[Rotary | None]:
    """The rotation of each layer in texts of ``length`` tokens; None where it knows no positions.

    One token is run through the model at a few positions, all in one pass. Queries and keys of
    every layer must be those of position 0 turned by ``inv_freq · position``, for a buffer
    ``inv_freq`` that some module of the model has then, in pairs of one kind or the other.

    Where frequencies depend on the length of the text (dynamic NTK, longrope), transformers sets
    them by the last position of a pass: here, by length - 1.

    Raises:
        NotImplementedError: positions have another effect than that, such as learned or ALiBi
            encodings.
    """
    positions = [0, *sorted({1, 3, length - 1} - {0})]
    token = min(1, model.geometry.vocab_size - 1)
    try:
        look(model, token)  # frequencies that an earlier, longer text has left are forgotten
        states = look(model, token, positions)[0]
        candidates: list[Rotary | None] = [None]
        for frequencies in _frequencies(model.model):
            candidates += [Rotary(frequencies, interleaved) for interleaved in (False, True)]
    except IndexError as error:  # a table of learned positions ends somewhere
        raise _unlike_rotary(model, 0) from error
    finally:
        look(model, token)
    found: list[Rotary | None] = []
    for layer, (query, key, *_) in enumerate(states):
        fitting = [
            rotary
            for rotary in candidates
            if _explains(rotary, positions, query) and _explains(rotary, positions, key)
        ]
        if not fitting:
            raise _unlike_rotary(model, layer)
        found.append(fitting[0])
    return found


def _unlike_rotary(model: PagedModel, layer: int) -> NotImplementedError:
    return NotImplementedError(
        f"{type(model.model).__name__}: queries and keys of layer {layer} at other positions are "
        "not those at position 0 turned by rotary embeddings (inv_freq); streaming relies on that"
    )


def steady_length(model: PagedModel, most: int) -> int:
    """Texts of so many tokens, ``most`` or fewer, are all turned by the same frequencies."""
    kinds: set[str | None] = set()
    for module in model.model.modules():
        kind = getattr(module, "rope_type", None)
        kinds.update(kind.values() if isinstance(kind, dict) else [kind])
    if kinds <= _FIXED:  # nearly all models: it is not worth a few passes
        return most

    def same(length: int) -> bool:
        look(model)
        short = _frequencies(model.model)
        look(model, positions=[length - 1])
        long = _frequencies(model.model)
        look(model)
        return len(short) == len(long) and all(map(torch.equal, short, long))

    steady, changed = 1, most + 1
    if same(most):
        return most
    while changed - steady > 1:
        middle = (steady + changed) // 2
        steady, changed = (middle, changed) if same(middle) else (steady, middle)
    return steady


def _explains(rotary: Rotary | None, positions: list[int], states: Tensor) -> bool:
    """Whether states [n, H, D] at these positions are the first one, which is at 0, turned."""
    before, after = states[:1].expand_as(states), states
    if rotary is not None:
        if 2 * len(rotary.inv_freq) > states.shape[-1]:
            return False
        before = rotary.rotate(before, rotary.angles(torch.tensor(positions).to(states.device)))
    errors = (after.float() - before.float()).flatten(1).norm(dim=1)
    # The model forms its angles in float32.
    rounding = torch.tensor(positions).to(errors) * 2.0**-22 + 4 * torch.finfo(states.dtype).eps
    return bool((errors <= rounding.clamp(min=1e-4) * after.float().flatten(1).norm(dim=1)).all())


def _frequencies(model: Any) -> list[Tensor]:
    """The different buffers named …inv_freq, float64."""
    found: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1:
            frequencies = buffer.detach().double().cpu()
            if not any(torch.equal(frequencies, other) for other in found):
                found.append(frequencies)
    return found
