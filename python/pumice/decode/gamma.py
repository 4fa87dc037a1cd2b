"""How many tokens to draft: a fixed number, or the one that makes most tokens a second.

With acceptance α a pass over γ drafts yields E(γ) = (1 − α^(γ+1)) / (1 − α) tokens and takes T(γ) =
t0 + t1·γ seconds: t0 for the target's pass, t1 for drafting a token and for verifying it (nearly
free where the target is bound by reading its weights, not free on a CPU). :class:`AdaptiveGamma`
measures α of each request and the times, and chooses the γ of the largest E(γ) / T(γ). That may be
0: then the draft is of no use here, and is only tried again now and then.
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
_SAMPLES = 15  # of the time of a γ; their median is not moved by a pass that held a prompt


class AdaptiveGamma:
    """Chooses γ in [0, max_drafts] by measured acceptance and time.

    ``acceptance``: what α is taken for before anything is measured. ``cost``: t1 / t0, the time
    of drafting and verifying one more token over that of the target's pass with none; None
    measures it, so that γ depends on the machine and what else it does. Tokens have the target's
    distribution anyway, but with a seed only a fixed γ, or ``cost``, gives the same ones again.
    ``explore``: every so many passes a neighbour of the best γ is tried, to keep the record fresh.
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
        # Two different γ are needed to tell t0 from t1.
        self._warm_up = [] if cost is not None else [max_drafts // 2, max_drafts, 0]
        self._passes = 0
        self._trial = 0

    def begin_pass(self) -> None:
        """To be called once before the γ of a pass's requests are chosen."""
        self._passes += 1
        self._trial = 0
        if self._passes % self.explore == 0:
            self._trial = 1 if self._passes % (2 * self.explore) else -1

    def choose(self, id: int) -> int:
        """γ for a request in this pass."""
        if self._passes <= len(self._warm_up):
            return self._warm_up[self._passes - 1]
        best = self.best(self.acceptance(id))
        trial = abs(self._trial) if best == 0 else self._trial
        return min(best + trial, self.max_drafts)

    def best(self, acceptance: float) -> int:
        """The γ of the most tokens a second at this α, the smallest of equals."""
        cost = self.cost
        speeds = [
            expected_tokens(acceptance, gamma) / (1 + cost * gamma)
            for gamma in range(self.max_drafts + 1)
        ]
        return speeds.index(max(speeds))

    def acceptance(self, id: int) -> float:
        """α of a request: its own record, and for want of that everybody's."""
        common = self._all.rate_given(self._acceptance, _PRIOR_TESTS)
        own = self._requests.get(id)
        return common if own is None else own.rate_given(common, _PRIOR_TESTS)

    @property
    def cost(self) -> float:
        """t1 / t0: what was given, or the line of least squares through the median times."""
        if self._cost is not None:
            return self._cost
        points = {gamma: statistics.median(times) for gamma, times in self._times.items()}
        if len(points) < 2:
            return 0.2  # nothing is known yet
        slope, intercept = statistics.linear_regression(list(points), list(points.values()))
        # A line that noise tilted is cut to what is possible: drafts are never a gain of time,
        # nor is a pass without any free.
        return max(slope, 0.0) / max(intercept, 0.1 * min(points.values()))

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
        self._begun = begun if requests else None
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
        if isinstance(self.gamma, AdaptiveGamma):
            self.gamma.forget(id)
