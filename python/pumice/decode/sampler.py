"""From the logits of a pass to the tokens of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pumice.decode.draft import Proposal
from pumice.decode.draft_tree import Tree
from pumice.decode.packing import upload
from pumice.decode.request import Request
from pumice.decode.scheduler import Plan
from pumice.decode.tree_verify import verify_trees
from pumice.ops.sampling import sample, sampling_probs, speculative_verify

__all__ = ["Choice", "Guesses", "Rows", "Sampler"]


@dataclass
class Guesses:
    """What a draft proposed: ``tokens`` by id of the request.

    Either chains, in ``proposal``, of which a request's row is ``places[id]``; or ``trees``, whose
    nodes are the tokens.
    """

    tokens: dict[int, list[int]]
    proposal: Proposal | None = None
    places: dict[int, int] = field(default_factory=dict)
    trees: dict[int, Tree] = field(default_factory=dict)

    def follow(self, id: int, likeliest: list[int]) -> list[int]:
        """Which drafts of a request are what would have been taken, from the first on.

        ``likeliest``: the token after its last one, then that after each draft.
        """
        tree = self.trees.get(id)
        if tree is not None:
            return tree.follow(likeliest)
        kept = 0
        for token, likely in zip(self.tokens[id], likeliest, strict=False):
            if token != likely:
                break
            kept += 1
        return list(range(kept))


@dataclass(slots=True)
class Choice:
    """What was drawn for a sequence: the drafts that were accepted, then one more token.

    ``child``: above 0 for further samples of the request, which branch off now. ``valid``: the
    logits gave a distribution; else the tokens mean nothing. ``kept``: the accepted drafts, by
    number.
    """

    request: Request
    child: int
    tokens: list[int]
    logprobs: list[float] | None
    valid: bool
    kept: list[int]


class Rows:
    """After which tokens of a pass another token is drawn: of these logits are needed.

    Of ``requests[n]``, which is number ``places[n]`` of the plan and has ``drafts[n]`` drafts, the
    rows are ``begins[n]`` … ``begins[n] + drafts[n]``; ``index`` is where those tokens stand in the
    batch. Requests whose prompts are still being read have none.
    """

    def __init__(self, plan: Plan) -> None:
        lengths = [len(request.tokens) - request.num_computed for request in plan.requests]
        places = np.flatnonzero(plan.counts - plan.num_drafts == lengths)
        self.places: list[int] = places.tolist()
        self.requests = [plan.requests[place] for place in self.places]
        drafts = plan.num_drafts[places]
        self.drafts: list[int] = drafts.tolist()
        ends = np.cumsum(drafts + 1)
        begins = ends - drafts - 1
        self.begins: list[int] = begins.tolist()
        first = np.cumsum(plan.counts)[places] - 1 - drafts
        self.index = np.repeat(first - begins, drafts + 1) + np.arange(int((drafts + 1).sum()))


class Sampler:
    """Draws tokens. Parameters of requests are uploaded again only when others take part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key: list[tuple[int, int]] = []
        self._filters: dict[str, Any] = {}
        self._seeds = torch.empty(0)

    def choose(self, logits: Tensor, rows: Rows, guesses: Guesses | None) -> list[Choice]:
        """A choice for each sequence that is due one; ``logits`` [R, V] are those of ``rows``.

        Drafts of greedy requests are compared with the likeliest tokens, which is what judging
        them comes to; others are judged by :func:`pumice.ops.speculative_verify`,
        or :func:`pumice.ops.speculative_verify_tree`.
        """
        plain: list[int] = []
        chains: list[int] = []
        trees: list[int] = []
        for n, request in enumerate(rows.requests):
            if not rows.drafts[n] or request.params.greedy:
                plain.append(n)
            elif guesses is not None and request.id in guesses.trees:
                trees.append(n)
            else:
                chains.append(n)
        choices = self._draw(logits, rows, plain, guesses) if plain else []
        if chains:
            assert guesses is not None
            assert guesses.proposal is not None
            choices += self._judge_chains(logits, rows, chains, guesses.proposal, guesses.places)
        if trees:
            assert guesses is not None
            choices += self._judge_trees(logits, rows, trees, guesses.trees)
        return choices

    def _draw(
        self, logits: Tensor, rows: Rows, which: list[int], guesses: Guesses | None
    ) -> list[Choice]:
        """Requests that have no drafts, or take the likeliest token in any case."""
        owners: list[tuple[int, int]] = []  # of each drawn token: request, sample
        picked: list[int] = []
        for n in which:
            length = rows.drafts[n] + 1
            for child in range(rows.requests[n].forks):
                owners += [(n, child)] * length
                picked += range(rows.begins[n], rows.begins[n] + length)
        logits = self._pick(logits, picked)
        filters, seeds = self._parameters(rows.requests, owners)
        positions = np.array([len(rows.requests[n].tokens) for n, _ in owners], np.int64)
        drawn, ln_filtered = sample(
            logits, **filters, seeds=seeds, positions=upload(positions, self.device)
        )
        tokens, valid = drawn.tolist(), (~ln_filtered.isnan()).tolist()
        logprobs = _logprobs(logits, drawn, [rows.requests[n] for n in which])

        choices: list[Choice] = []
        place = 0
        while place < len(owners):
            n, child = owners[place]
            request, drafts = rows.requests[n], rows.drafts[n]
            end = place + drafts + 1
            kept: list[int] = []
            if drafts:
                assert guesses is not None
                kept = guesses.follow(request.id, tokens[place:end])
            of = [place, *(place + 1 + draft for draft in kept)]
            choices.append(
                Choice(
                    request,
                    child,
                    [tokens[i] for i in of],
                    [logprobs[i] for i in of] if logprobs else None,
                    all(valid[i] for i in of),
                    kept,
                )
            )
            place = end
        return choices

    def _judge_chains(
        self,
        logits: Tensor,
        rows: Rows,
        which: list[int],
        proposal: Proposal,
        place_of: dict[int, int],
    ) -> list[Choice]:
        """Requests with drafts and a temperature: accept, reject, draw again."""
        requests, width = [rows.requests[n] for n in which], proposal.tokens.shape[1]
        drafts = np.array([rows.drafts[n] for n in which], np.int32)
        begins = np.array([rows.begins[n] for n in which], np.int64)
        # Rows past a request's drafts are not looked at: any will do.
        picked = begins[:, None] + np.minimum(np.arange(width + 1), drafts[:, None])
        logits = self._pick(logits, picked.ravel().tolist())
        owners = [(n, 0) for n in which for _ in range(width + 1)]
        filters, seeds = self._parameters(rows.requests, owners)
        probs = sampling_probs(logits, **filters).view(len(which), width + 1, -1)
        places = upload(np.array([place_of[r.id] for r in requests], np.int64), self.device)
        positions = np.array([len(request.tokens) for request in requests], np.int64)
        drawn, accepted = speculative_verify(
            proposal.tokens.to(self.device)[places],
            probs,
            num_drafts=upload(drafts, self.device),
            draft_probs=None if proposal.probs is None else proposal.probs.to(self.device)[places],
            seeds=seeds[:: width + 1].contiguous(),
            positions=upload(positions, self.device),
        )
        tokens, kept = drawn.tolist(), accepted.tolist()
        valid = (~probs[:, :, 0].isnan()).tolist()
        logprobs = _logprobs(logits, drawn.clamp(min=0).ravel(), requests)
        choices = []
        for i, request in enumerate(requests):
            length = kept[i] + 1
            begin = i * (width + 1)
            ln_p = logprobs[begin : begin + length] if logprobs else None
            choices.append(
                Choice(
                    request, 0, tokens[i][:length], ln_p, all(valid[i][:length]),
                    list(range(kept[i])),
                )
            )  # fmt: skip
        return choices

    def _judge_trees(
        self, logits: Tensor, rows: Rows, which: list[int], tree_of: dict[int, Tree]
    ) -> list[Choice]:
        """The same with trees."""
        requests = [rows.requests[n] for n in which]
        trees = [tree_of[request.id] for request in requests]
        picked = [rows.begins[n] + i for n in which for i in range(rows.drafts[n] + 1)]
        owners = [(n, 0) for n in which for _ in range(rows.drafts[n] + 1)]
        logits = self._pick(logits, picked)
        filters, seeds = self._parameters(rows.requests, owners)
        probs = sampling_probs(logits, **filters)
        begins = np.cumsum([0, *(len(tree) + 1 for tree in trees)])[:-1]
        positions = np.array([len(request.tokens) for request in requests], np.int64)
        tokens, paths = verify_trees(
            probs, trees, seeds[upload(begins, self.device)], upload(positions, self.device)
        )
        valid = (~probs[:, 0].isnan()).tolist()
        choices = []
        for request, begin, row, path in zip(requests, begins.tolist(), tokens, paths, strict=True):
            of = [begin, *(begin + 1 + node for node in path)]
            drawn = torch.tensor(row, device=self.device)
            ln_p = _logprobs(logits[of], drawn, [request])
            choices.append(Choice(request, 0, row, ln_p, all(valid[i] for i in of), path))
        return choices

    def _pick(self, logits: Tensor, rows: list[int]) -> Tensor:
        if rows == list(range(logits.shape[0])):
            return logits
        return logits[upload(np.array(rows, np.int64), self.device)]

    def _parameters(
        self, requests: Sequence[Request], owners: Sequence[tuple[int, int]]
    ) -> tuple[dict[str, Any], Tensor]:
        key = [(requests[n].id, child) for n, child in owners]
        if key != self._key:
            params = [requests[n].params for n, _ in owners]
            seeds = [requests[n].seed + child for n, child in owners]
            self._filters = {
                "temperature": self._column([p.temperature for p in params], 1.0, np.float32),
                "top_k": self._column([p.top_k for p in params], 0, np.int32),
                "top_p": self._column([p.top_p for p in params], 1.0, np.float32),
                "min_p": self._column([p.min_p for p in params], 0.0, np.float32),
            }
            self._seeds = upload(np.array(seeds, np.int64), self.device)
            self._key = key
        return self._filters, self._seeds

    def _column(self, values: list[Any], neutral: float, dtype: type[np.generic]) -> Tensor | None:
        if all(value == neutral for value in values):
            return None
        return upload(np.array(values, dtype), self.device)


def _logprobs(logits: Tensor, tokens: Tensor, requests: Sequence[Request]) -> list[float] | None:
    """ln p of tokens under softmax(logits), if a request wants them."""
    if not any(request.params.logprobs for request in requests):
        return None
    scores = logits.float()
    values: list[float] = (scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(-1)).tolist()
    return values
