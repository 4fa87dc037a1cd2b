"""Decoding: the paged key-value cache and what generates text with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pumice.decode.batch import PagedBatch
from pumice.decode.block_manager import (
    Allocation,
    BlockManager,
    DoubleFreeError,
    OutOfBlocksError,
    Stats,
    Step,
    UnknownSequenceError,
)
from pumice.decode.pool import CachePool
from pumice.decode.runner import ModelRunner

if TYPE_CHECKING:
    from pumice.decode.paged_cache import PagedCache

__all__ = [
    "Allocation",
    "BlockManager",
    "CachePool",
    "DoubleFreeError",
    "ModelRunner",
    "OutOfBlocksError",
    "PagedBatch",
    "PagedCache",
    "Stats",
    "Step",
    "UnknownSequenceError",
]


def __getattr__(name: str) -> Any:
    if name == "PagedCache":  # a class of transformers', which takes seconds to import
        from pumice.decode.paged_cache import PagedCache

        return PagedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
