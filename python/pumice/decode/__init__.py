"""Decoding: the paged key-value cache and what generates text with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pumice.decode.acceptance import Acceptance, expected_tokens
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
from pumice.decode.draft import Draft, DraftRequest, Proposal
from pumice.decode.draft_compressed import compressed_draft
from pumice.decode.draft_early_exit import EarlyExitDraft
from pumice.decode.draft_model import ModelDraft
from pumice.decode.draft_ngram import NgramDraft
from pumice.decode.draft_tree import NgramTreeDraft, Tree, TreeDraft
from pumice.decode.draft_tree_model import ModelTreeDraft
from pumice.decode.engine import Engine, EngineStats
from pumice.decode.gamma import AdaptiveGamma
from pumice.decode.generate import GenerationError, generate
from pumice.decode.output import Completion, Output
from pumice.decode.pool import CachePool
from pumice.decode.request import SamplingParams, UnknownRequestError
from pumice.decode.runner import ModelRunner
from pumice.decode.speculative import TreeDecoder
from pumice.decode.stream_perplexity import (
    StreamPerplexity,
    recomputed_perplexity,
    stream_perplexity,
)
from pumice.decode.streaming import StreamingModel

if TYPE_CHECKING:
    from pumice.decode.paged_cache import PagedCache

__all__ = [
    "Acceptance",
    "AdaptiveGamma",
    "Allocation",
    "BlockManager",
    "CachePool",
    "Completion",
    "DoubleFreeError",
    "Draft",
    "DraftRequest",
    "EarlyExitDraft",
    "Engine",
    "EngineStats",
    "GenerationError",
    "ModelDraft",
    "ModelRunner",
    "ModelTreeDraft",
    "NgramDraft",
    "NgramTreeDraft",
    "OutOfBlocksError",
    "Output",
    "PagedBatch",
    "PagedCache",
    "Proposal",
    "SamplingParams",
    "Stats",
    "Step",
    "StreamPerplexity",
    "StreamingModel",
    "Tree",
    "TreeDecoder",
    "TreeDraft",
    "UnknownRequestError",
    "UnknownSequenceError",
    "compressed_draft",
    "expected_tokens",
    "generate",
    "recomputed_perplexity",
    "stream_perplexity",
]


def __getattr__(name: str) -> Any:
    if name == "PagedCache":  # a class of transformers', which takes seconds to import
        from pumice.decode.paged_cache import PagedCache

        return PagedCache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
