"""Pruning methods, one file each, named after the method."""

from pumice.prune.magnitude import Magnitude
from pumice.prune.pattern import NofM
from pumice.prune.prune_and_tune import PruneAndTune
from pumice.prune.recipe import PruningRecipe
from pumice.prune.sparsegpt import SparseGPT
from pumice.prune.wanda import Wanda

__all__ = ["Magnitude", "NofM", "PruneAndTune", "PruningRecipe", "SparseGPT", "Wanda"]
