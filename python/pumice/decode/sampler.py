"""From the logits of a pass to the tokens of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pumice.decode.draft import Proposal
from pumice.decode.packing import upload
from pumice.decode.request import Request
from pumice.decode.scheduler import Plan
from pumice.ops.sampling import sample, sampling_probs, speculative_verify

__all__ = ["Choice", "Guesses", "Rows", "Sampler"]


@dataclass
class Guesses:
    """What a draft proposed: ``tokens`` by id of the request, whose row is ``places[id]``."""

    proposal: Proposal
    places: dict[int, int]
    tokens: dict[int, list[int]]


@dataclass(slots=True)
class Choice:
    """What was drawn for a sequence: the drafts that were accepted, then one more token.

    ``child``: above 0 for further samples of the request, which branch off now. ``valid``: the
    logits gave a distribution; else the tokens mean nothing.
    """

    request: Request
    child: int
    tokens: list[int]
    logprobs: list[float] | None
    valid: bool


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
        them comes to; others are judged by :func:`pumice.ops.speculative_verify`.
        """
        plain: list[int] = []
        judged: list[int] = []
        for n, request in enumerate(rows.requests):
            (judged if rows.drafts[n] and not request.params.greedy else plain).append(n)
        choices = self._draw(logits, rows, plain, guesses) if plain else []
        if judged:
            assert guesses is not None
            choices += self._judge(logits, rows, judged, guesses)
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
            kept = 0
            if drafts:
                assert guesses is not None
                kept = _agreeing(tokens[place : place + drafts], guesses.tokens[request.id])
            of = slice(place, place + kept + 1)
            ln_p = logprobs[of] if logprobs else None
            choices.append(Choice(request, child, tokens[of], ln_p, all(valid[of])))
            place += drafts + 1
        return choices

    def _judge(
        self, logits: Tensor, rows: Rows, which: list[int], guesses: Guesses
    ) -> list[Choice]:
        """Requests with drafts and a temperature: accept, reject, draw again."""
        requests = [rows.requests[n] for n in which]
        proposal, width = guesses.proposal, guesses.proposal.tokens.shape[1]
        drafts = np.array([rows.drafts[n] for n in which], np.int32)
        begins = np.array([rows.begins[n] for n in which], np.int64)
        # Rows past a request's drafts are not looked at: any will do.
        picked = begins[:, None] + np.minimum(np.arange(width + 1), drafts[:, None])
        logits = self._pick(logits, picked.ravel().tolist())
        owners = [(n, 0) for n in which for _ in range(width + 1)]
        filters, seeds = self._parameters(rows.requests, owners)
        probs = sampling_probs(logits, **filters).view(len(which), width + 1, -1)
        places = upload(np.array([guesses.places[r.id] for r in requests], np.int64), self.device)
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
            choices.append(Choice(request, 0, tokens[i][:length], ln_p, all(valid[i][:length])))
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


def _agreeing(likeliest: list[int], drafts: list[int]) -> int:
    """How many drafts, from the first on, are what would have been taken."""
    kept = 0
    while kept < len(likeliest) and likeliest[kept] == drafts[kept]:
        kept += 1
    return kept


def _logprobs(logits: Tensor, tokens: Tensor, requests: Sequence[Request]) -> list[float] | None:
    """ln p of tokens under softmax(logits), if a request wants them."""
    if not any(request.params.logprobs for request in requests):
        return None
    scores = logits.float()
    values: list[float] = (scores.gather(1, tokens[:, None])[:, 0] - scores.logsumexp(-1)).tolist()
    return values
