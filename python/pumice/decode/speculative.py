"""Speculative decoding by trees: generation from prompts with a draft that branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pumice.decode.acceptance import Acceptance
from pumice.decode.batch import PagedBatch
from pumice.decode.block_manager import BlockManager
from pumice.decode.draft import DraftRequest
from pumice.decode.draft_tree import Tree, TreeDraft
from pumice.decode.request import SamplingParams, check_prompt
from pumice.decode.runner import ModelRunner
from pumice.decode.tree_step import tree_step

__all__ = ["TreeDecoder"]


_PREFILL_TOKENS = 2048  # prompts are put together until there are so many tokens


@dataclass(eq=False)
class _Running:
    """A sequence that is being generated; ``id`` is the block manager's."""

    id: int
    index: int
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    seed: int

    @property
    def remaining(self) -> int:
        return self.params.max_new_tokens - (len(self.tokens) - self.prompt_len)


class TreeDecoder:
    """Generates from a batch of prompts with a :class:`~pumice.decode.TreeDraft`.

    ::

        decoder = TreeDecoder(model, NgramTreeDraft(branches=3, depth=6))
        texts = decoder.generate([prompt, …], SamplingParams(max_new_tokens=100))

    What comes out has the distribution of the model's own samples, greedy ones are its greedy
    ones; ``record`` tells how many tokens a pass yielded. All prompts start together and the batch
    shrinks as they end: for requests that come and go there is :class:`~pumice.decode.Engine`,
    which takes the same drafts.

    Args:
        model: what :class:`~pumice.decode.ModelRunner` takes. Its layers must see everything
            before them: windows count slots of the cache, and in a tree these are no positions.
        draft: with the vocabulary of the model.
        num_blocks, block_size, cache_dtype: of the cache.

    Raises:
        ValueError: another vocabulary; a model with windows.
    """

    def __init__(
        self,
        model: nn.Module,
        draft: TreeDraft,
        *,
        num_blocks: int = 1024,
        block_size: int = 16,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.runner = ModelRunner(
            model, num_blocks=num_blocks, block_size=block_size, cache_dtype=cache_dtype
        )
        if draft.vocab_size is not None and draft.vocab_size != self.runner.vocab_size:
            raise ValueError(
                f"TreeDecoder: the draft has a vocabulary of {draft.vocab_size} tokens, but the "
                f"model of {self.runner.vocab_size}"
            )
        if any(window is not None for window in self.runner.geometry.windows):
            raise ValueError(
                f"TreeDecoder: {type(model).__name__} has layers with a window, which trees do not "
                "go with; use an Engine with a draft"
            )
        self.draft = draft
        self.manager = BlockManager(num_blocks, block_size)
        self.record = Acceptance()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[list[int]]:
        """The new tokens of each prompt, a stop token included.

        Of ``params``, one for all or one each, ``n``, ``stop`` and ``logprobs`` are refused.

        Raises:
            OutOfBlocksError: the cache is too small for all of them, trees left out.
        """
        given = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(given) != len(prompts):
            raise ValueError(
                f"TreeDecoder.generate: {len(prompts)} prompts, but {len(given)} params"
            )
        for one in given:
            if one.n != 1 or one.stop or one.logprobs:
                raise ValueError(
                    "TreeDecoder.generate: n > 1, stop and logprobs are not supported; "
                    "an Engine has them"
                )
        checked = [check_prompt(prompt, self.runner.vocab_size) for prompt in prompts]
        ends = _end_tokens(self.runner.model)
        running: list[_Running] = []
        results: list[list[int]] = [[] for _ in prompts]
        try:
            self._begin(running, checked, given)
            while running:
                self._step(running)
                for sequence in running:
                    results[sequence.index] = sequence.tokens[sequence.prompt_len :]
                ended = [s for s in running if _cut(results[s.index], s.params, ends)]
                running = [s for s in running if s not in ended]
                self._end(ended)
        finally:
            self._end(running)  # after an error
        return results

    def _begin(
        self,
        running: list[_Running],
        prompts: Sequence[npt.NDArray[np.int32]],
        params: Sequence[SamplingParams],
    ) -> None:
        """Run all of each prompt but its last token, the first root."""
        waiting: list[tuple[int, list[int]]] = []  # of several prompts, to be run in one pass
        for index, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            new = self.manager.allocate(prompt, limit=0)
            seed = int(torch.randint(2**62, ())) if one.seed is None else one.seed
            running.append(_Running(new.id, index, prompt.tolist(), len(prompt), one, seed))
            if len(prompt) - 1 > new.cached_tokens:
                waiting.append((new.id, running[-1].tokens[new.cached_tokens : -1]))
            full = sum(len(tokens) for _, tokens in waiting) >= _PREFILL_TOKENS
            if waiting and (full or index == len(prompts) - 1):
                ids, tokens = zip(*waiting, strict=True)
                step = self.manager.append(
                    ids, [t for row in tokens for t in row], [*map(len, tokens)]
                )
                batch = PagedBatch.from_step(self.runner.pool, step, tokens)
                self.runner.forward(batch, torch.empty(0, dtype=torch.int64))
                self.manager.commit(ids)
                waiting.clear()

    def _step(self, running: list[_Running]) -> None:
        trees = self.draft.propose(
            [DraftRequest(s.id, s.tokens, s.remaining - 1, s.params, s.seed) for s in running]
        )
        counts = [1 + len(tree) for tree in trees]
        if not self.manager.can_append([s.id for s in running], counts):
            trees = [Tree() for _ in running]
        accepted = tree_step(
            self.runner,
            self.manager,
            [s.id for s in running],
            [s.tokens[-1] for s in running],
            trees,
            [s.params for s in running],
            [s.seed for s in running],
        )
        for sequence, tree, tokens in zip(running, trees, accepted, strict=True):
            sequence.tokens += tokens
            self.record.passes += 1
            self.record.drafted += len(tree)
            self.record.accepted += len(tokens) - 1

    def _end(self, sequences: list[_Running]) -> None:
        for sequence in sequences:
            self.manager.free([sequence.id])
            self.draft.release(sequence.id)


def _end_tokens(model: nn.Module) -> frozenset[int]:
    """The end-of-sequence tokens of a transformers model."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return frozenset([ends] if isinstance(ends, int) else ends)
    return frozenset()


def _cut(tokens: list[int], params: SamplingParams, ends: frozenset[int]) -> bool:
    """Cut what was generated after the first token that ends it; whether it has ended."""
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else ends)
    for place, token in enumerate(tokens):
        if token in stops:
            del tokens[place + 1 :]
            return True
    return len(tokens) >= params.max_new_tokens
