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
from pumice.decode.engine import Engine, EngineStats
from pumice.decode.generate import GenerationError, generate
from pumice.decode.output import Completion, Output
from pumice.decode.pool import CachePool
from pumice.decode.request import SamplingParams, UnknownRequestError
from pumice.decode.runner import ModelRunner

if TYPE_CHECKING:
    from pumice.decode.paged_cache import PagedCache

__all__ = [
    "Allocation",
    "BlockManager",
    "CachePool",
    "Completion",
    "DoubleFreeError",
    "Engine",
    "EngineStats",
    "GenerationError",
    "ModelRunner",
    "OutOfBlocksError",
    "Output",
    "PagedBatch",
    "PagedCache",
    "SamplingParams",
    "Stats",
    "Step",
    "UnknownRequestError",
    "UnknownSequenceError",
    "generate",
]


def __getattr__(name: str) -> Any:
    if name == "PagedCache":  # a class of transformers', which takes seconds to import
        from pumice.decode.paged_cache import PagedCache

        return PagedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
