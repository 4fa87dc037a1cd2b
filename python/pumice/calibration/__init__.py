"""Calibration: run a model block by block and let methods see what its layers are given."""

from pumice.calibration.block import Block, SharedInput
from pumice.calibration.engine import Outcome, Settings, Stage, run
from pumice.calibration.stack import Stack, find_stack
from pumice.calibration.statistics import (
    ColumnNorm,
    DiagonalBlocks,
    Hessian,
    MeanAbs,
    Statistic,
)

__all__ = [
    "Block",
    "ColumnNorm",
    "DiagonalBlocks",
    "Hessian",
    "MeanAbs",
    "Outcome",
    "Settings",
    "SharedInput",
    "Stack",
    "Stage",
    "Statistic",
    "find_stack",
    "run",
]
