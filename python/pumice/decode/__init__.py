"""Decoding: the paged key-value cache and what generates text with it."""

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

__all__ = [
    "Allocation",
    "BlockManager",
    "CachePool",
    "DoubleFreeError",
    "ModelRunner",
    "OutOfBlocksError",
    "PagedBatch",
    "Stats",
    "Step",
    "UnknownSequenceError",
]
