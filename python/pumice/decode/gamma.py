"""How many tokens to draft: a fixed number, or the one that makes most tokens a second.

With acceptance α a pass over γ drafts yields E(γ) = (1 − α^(γ+1)) / (1 − α) tokens. It takes T(γ)
seconds, for drafting and for the target's pass: a straight line from γ = 1 on, and T(0), which lies
below that line where libraries multiply one row faster than two. :class:`AdaptiveGamma` measures α
of each request and the times, and chooses the γ of the largest E(γ) / T(γ). That may be 0: then the
draft is of no use here, and is only tried again now and then.
"""

from __future__ import annotations

import statistics
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence

from pumice.decode.acceptance import Acceptance, expected_tokens
from pumice.decode.draft import Draft, DraftRequest, Proposal

__all__ = ["AdaptiveGamma", "PacedDraft"]

_OF_REQUEST = 50.0  # passes after which what a request's drafts did is half forgotten (roughly)
_OF_ALL = 500.0
_PRIOR_TESTS = 8.0  # drafts of a request before its own record counts as much as everybody's
_UNKNOWN_COST = 0.2  # of a draft, over a pass without any, until it is measured
_SAMPLES = 15  # of the time of a γ; their median is not moved by a pass that held a prompt


class AdaptiveGamma:
    """Chooses γ in [0, max_drafts] by measured acceptance and time.

    ``acceptance``: what α is taken for before anything is measured. ``cost``: T(γ) is 1 + cost·γ;
    None measures the times, so that γ depends on the machine and what else it does. Tokens have the
    target's distribution anyway, but with a seed only a fixed γ, or ``cost``, gives the same ones
    again.
    ``explore``: every so many passes a neighbour of the best γ is tried, or 0, to keep the record
    fresh.
    """

    def __init__(
        self,
        max_drafts: int = 8,
        *,
        acceptance: float = 0.7,
        cost: float | None = None,
        explore: int = 24,
    ) -> None:
        if max_drafts < 1:
            raise ValueError(f"AdaptiveGamma: max_drafts must be at least 1, not {max_drafts}")
        if not 0 <= acceptance <= 1:
            raise ValueError(f"AdaptiveGamma: acceptance must be in [0, 1], not {acceptance}")
        if cost is not None and not 0 <= cost < float("inf"):
            raise ValueError(f"AdaptiveGamma: cost must be at least 0 and finite, not {cost}")
        if explore < 2:
            raise ValueError(f"AdaptiveGamma: explore must be at least 2, not {explore}")
        self.max_drafts = max_drafts
        self.explore = explore
        self._cost = cost
        self._acceptance = acceptance
        self._all = Acceptance(memory=_OF_ALL)
        self._requests: dict[int, Acceptance] = {}
        self._times: dict[int, deque[float]] = {}
        half = (max_drafts + 1) // 2
        # The first pass reads the prompt and is not timed; a line needs two points.
        self._warm_up = [] if cost is not None else [half, half, 0, max_drafts, 0]
        self._passes = 0

    def begin_pass(self) -> None:
        """To be called once before the γ of a pass's requests are chosen."""
        self._passes += 1

    def choose(self, id: int) -> int:
        """γ for a request in this pass."""
        if self._passes <= len(self._warm_up):
            return self._warm_up[self._passes - 1]
        best = self.best(self.acceptance(id))
        turn, rest = divmod(self._passes, self.explore)
        if rest:
            return best
        others = [min(best + 1, self.max_drafts), max(best - 1, 1), 0]
        return others[turn % 3]

    def best(self, acceptance: float) -> int:
        """The γ of the most tokens a second at this α, the smallest of equals."""
        seconds = self.seconds()
        speeds = [expected_tokens(acceptance, gamma) / t for gamma, t in enumerate(seconds)]
        return speeds.index(max(speeds))

    def seconds(self) -> list[float]:
        """T(0) … T(max_drafts): by ``cost`` in units of T(0), else by what was measured."""
        gammas = range(self.max_drafts + 1)
        medians = {gamma: statistics.median(times) for gamma, times in self._times.items()}
        drafted = {gamma: t for gamma, t in medians.items() if gamma > 0}
        if self._cost is not None or not drafted:
            cost = _UNKNOWN_COST if self._cost is None else self._cost
            return [1 + cost * gamma for gamma in gammas]
        points = drafted if len(drafted) > 1 else medians
        if len(points) > 1:
            slope, intercept = statistics.linear_regression(list(points), list(points.values()))
            # A line that noise tilted is cut to what is possible: drafts take no less than no
            # time, and a pass is not free.
            slope, intercept = max(slope, 0.0), max(intercept, 0.1 * min(points.values()))
        else:
            ((gamma, t),) = points.items()
            intercept = t / (1 + _UNKNOWN_COST * gamma)
            slope = _UNKNOWN_COST * intercept
        line = [intercept + slope * gamma for gamma in gammas]
        return [medians.get(0, line[0]), *line[1:]]

    def acceptance(self, id: int) -> float:
        """α of a request: its own record, and for want of that everybody's."""
        common = self._all.rate_given(self._acceptance, _PRIOR_TESTS)
        own = self._requests.get(id)
        return common if own is None else own.rate_given(common, _PRIOR_TESTS)

    def observe(self, id: int, num_drafts: int, num_accepted: int) -> None:
        """The outcome of a request's drafts."""
        own = self._requests.setdefault(id, Acceptance(memory=_OF_REQUEST))
        if num_drafts:
            own.update(num_drafts, num_accepted)
            self._all.update(num_drafts, num_accepted)

    def observe_time(self, drafts_per_request: float, seconds: float) -> None:
        """What a pass took, drafting and target, with so many drafts a request on average."""
        samples = self._times.setdefault(round(drafts_per_request), deque(maxlen=_SAMPLES))
        samples.append(seconds)

    def forget(self, id: int) -> None:
        self._requests.pop(id, None)


class PacedDraft(Draft):
    """A draft whose γ is a number or an :class:`AdaptiveGamma`, and which keeps count.

    ``record``: the :class:`Acceptance` of all its drafts.
    """

    def __init__(self, gamma: int | AdaptiveGamma) -> None:
        if isinstance(gamma, bool) or not isinstance(gamma, (int, AdaptiveGamma)):
            raise TypeError(
                f"{type(self).__name__}: gamma must be an int or an AdaptiveGamma, not "
                f"{type(gamma).__name__}"
            )
        if isinstance(gamma, int) and gamma < 1:
            raise ValueError(f"{type(self).__name__}: gamma must be at least 1, not {gamma}")
        self.gamma = gamma
        self.max_drafts = gamma if isinstance(gamma, int) else gamma.max_drafts
        self.record = Acceptance()
        self._begun: float | None = None
        self._met: set[int] = set()
        self._drafts_per_request = 0.0

    @abstractmethod
    def draft(self, requests: Sequence[DraftRequest], limits: Sequence[int]) -> Proposal:
        """Propose at most ``limits[b]`` tokens for request b."""

    def propose(self, requests: Sequence[DraftRequest]) -> Proposal:
        begun = time.perf_counter()
        if isinstance(self.gamma, AdaptiveGamma):
            self.gamma.begin_pass()
            limits = [min(self.gamma.choose(r.id), r.max_drafts) for r in requests]
        else:
            limits = [min(self.gamma, r.max_drafts) for r in requests]
        proposal = self.draft(requests, limits)
        newcomers = [r.id for r in requests if r.id not in self._met]
        self._met.update(newcomers)
        # A pass in which a draft reads a prompt says nothing of those to come.
        self._begun = None if newcomers else begun
        if requests:
            self._drafts_per_request = float(proposal.num_drafts.float().mean())
        return proposal

    def accepted(self, id: int, num_drafts: int, num_accepted: int) -> None:
        if num_drafts:
            self.record.update(num_drafts, num_accepted)
        if isinstance(self.gamma, AdaptiveGamma):
            self.gamma.observe(id, num_drafts, num_accepted)
            if self._begun is not None:  # the first outcome ends the pass
                seconds = time.perf_counter() - self._begun
                self.gamma.observe_time(self._drafts_per_request, seconds)
        self._begun = None

    def release(self, id: int) -> None:
        self._met.discard(id)
        if isinstance(self.gamma, AdaptiveGamma):
            self.gamma.forget(id)
