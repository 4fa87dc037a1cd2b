"""What a model says of its own limits: how long a text may be, and which tokens end it."""

from __future__ import annotations

from typing import Any

from torch import nn

from pumice.decode.model import PagedModel
from pumice.decode.rotary import steady_length

__all__ = ["eos_token_ids", "length_limit"]


def length_limit(model: PagedModel, max_length: int | None) -> tuple[int | None, int | None]:
    """The most tokens of a sequence, and the position of the mark that passes need, if any.

    transformers turns all tokens of a pass by frequencies for the last position that occurs in it,
    where these depend on the length (longrope, dynamic NTK): a long text would change what its
    neighbours in the batch see, and what it has seen itself. So a limit that nobody asked for is
    that of the frequencies of short texts. Where more is asked for, a token of no sequence is put
    at the last position of every pass, the mark, and all texts have the frequencies of the longest.
    """
    most = _position_limit(model.model) if max_length is None else max_length
    steady = most if most is None else steady_length(model, most)
    if max_length is None or most is None or steady == most:
        return steady, None
    return most, most - 1


def _position_limit(model: nn.Module) -> int | None:
    """What the model's configuration says, if it does."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def eos_token_ids(model: nn.Module) -> frozenset[int]:
    """End-of-sequence tokens of transformers' generation_config."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset((ids,) if isinstance(ids, int) else ids)
