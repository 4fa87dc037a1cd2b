"""Decoding: the paged key-value cache and what generates text with it."""

from pumice.decode.block_manager import (
    Allocation,
    BlockManager,
    DoubleFreeError,
    OutOfBlocksError,
    Stats,
    Step,
    UnknownSequenceError,
)

__all__ = [
    "Allocation",
    "BlockManager",
    "DoubleFreeError",
    "OutOfBlocksError",
    "Stats",
    "Step",
    "UnknownSequenceError",
]
