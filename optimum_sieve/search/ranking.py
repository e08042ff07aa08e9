r"""Rank scored candidates of different sizes. Does not import torch.

The metric on a few hundred examples is noisy: the best of many candidates by it is mostly the luckiest. The expected
loss of the label predicts the metric on *other* examples better than the metric itself (docs/search.md has the
measurement). So the metric decides only at which size the energy allocation leaves the tolerance, the *limit*. A
candidate is ranked by its loss against that of the energy allocation of its own size, converted into parameters: its
*size* is the kept fraction at which its allocation would reach the limit. On several tasks the largest size counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from .candidate import Candidate, Outcome
    from .genome import SearchSpace


# The exchange rate is the slope of the energy allocation's loss between these kept fractions below and above the limit,
# and a nat is worth at most this kept fraction: where the loss hardly rises, noise must not count as size.
_WINDOW, _LARGEST_EXCHANGE = 0.08, 10.0
# Candidates farther from the limit than this kept fraction say little about it.
_NEAR = 0.15
# Decrease of the best size that counts as an improvement.
_LEAST_GAIN = 0.002


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Goal of a search.

    Args:
        tolerance (`float`): Largest acceptable drop, in points of the metric.
        confidence (`float`): One-sided confidence of the confirmation.
        confirm_counts (`tuple[int, ...]`): Confirmation examples of each task.
        kept (`float`, *optional*): Kept fraction to reach. `None`: the least within the tolerance.
    """

    tolerance: float
    confidence: float
    confirm_counts: tuple[int, ...]
    kept: float | None = None

    def room(self, outcome: Outcome, task: int) -> float:
        """Return how far inside the tolerance a confirmation is expected to end, in points of the metric."""
        margin = outcome.mean - outcome.bound(self.confidence, self.confirm_counts[task])
        return outcome.expected - margin + self.tolerance


class EnergyCurve:
    """Loss of the energy allocation against its kept fraction, on one task.

    It is made from rise and room of some energy allocations by kept fraction; `kept` is the limit, if it is given.
    """

    def __init__(self, points: Mapping[float, tuple[float, float]], kept: float | None) -> None:
        sizes = np.array(sorted(points, reverse=True))
        rises, rooms = np.array([points[size] for size in sizes]).T
        self.limit = _crossing(sizes, rooms) if kept is None else kept
        # A little pruning can lower the loss. Count the rise from there on.
        self._smallest, rises = sizes[-1], np.minimum.accumulate(rises[::-1])
        # Workers may score another candidate before the first energy allocation: only the dense point is known then.
        self._interpolate = PchipInterpolator(sizes[::-1], rises) if len(sizes) > 1 else lambda kept: rises[0]
        low, high = max(self.limit - _WINDOW, self._smallest), min(self.limit + _WINDOW, 1.0)
        fall = self.rise(low) - self.rise(high)
        self.exchange = float(min((high - low) / fall, _LARGEST_EXCHANGE)) if fall > 0 else _LARGEST_EXCHANGE

    def rise(self, kept: float) -> float:
        """Return the rise at a kept fraction, interpolated monotonically; constant below the smallest point."""
        return float(self._interpolate(max(kept, self._smallest)))


def _crossing(sizes: NDArray[np.float64], rooms: NDArray[np.float64]) -> float:
    """Return the size at which the room, made monotonic, reaches 0."""
    falling = isotonic_regression(rooms, increasing=False).x
    below = int((falling >= 0).sum())
    if below in (0, len(sizes)):
        return float(sizes[max(below - 1, 0)])
    share = falling[below - 1] / (falling[below - 1] - falling[below])
    return float(sizes[below - 1] + share * (sizes[below] - sizes[below - 1]))


class Ranking:
    """Scored candidates, compared by the kept fraction at which their allocations would reach the limit."""

    def __init__(self, space: SearchSpace, scored: Sequence[Candidate], goal: Goal) -> None:
        self.space, self.scored, self.goal = space, scored, goal
        complete = [candidate for candidate in scored if candidate.is_complete]
        tasks = range(len(goal.confirm_counts))
        rises = [[_part(candidate, task).rises for candidate in complete] for task in tasks]
        self._references = [np.mean(arrays, axis=0) if arrays else None for arrays in rises]
        self.curves = [self._curve(task) for task in tasks]
        self.limit = max(curve.limit for curve in self.curves)
        most = 1.0 if goal.kept is None else goal.kept
        near = [c for c in complete if abs(space.kept(c.genome) - self.limit) < _NEAR and space.kept(c.genome) <= most]
        self.best_first = sorted(near or complete, key=lambda candidate: (self.size(candidate), candidate.key))

    def _curve(self, task: int) -> EnergyCurve:
        points = {
            self.space.kept(seed.genome): (self.rise(seed, task), self.goal.room(_part(seed, task), task))
            for seed in self.scored
            if seed.origin == "energy"
        }
        return EnergyCurve({**points, 1.0: (0.0, self.goal.tolerance)}, self.goal.kept)

    def rise(self, candidate: Candidate, task: int = 0) -> float:
        """Return the rise of the loss on all examples of a task.

        For a dropped candidate this is an estimate: the complete candidates show how much harder its examples are.
        """
        outcome, reference = _part(candidate, task), self._references[task]
        if outcome.complete or reference is None:
            return outcome.rise
        return outcome.rise + float(reference.mean() - reference[: outcome.count].mean())

    def size(self, candidate: Candidate) -> float:
        """Return the kept fraction at which the candidate's allocation would reach the limit."""
        kept = self.space.kept(candidate.genome)
        return max(
            curve.limit + curve.exchange * (self.rise(candidate, task) - curve.rise(kept))
            for task, curve in enumerate(self.curves)
        )

    def has_stalled(self, patience: int) -> bool:
        """Whether the last `patience` generations hardly improved the best size."""
        last = max(candidate.generation for candidate in self.scored)
        before = [candidate for candidate in self.best_first if candidate.generation <= last - patience]
        return bool(before) and self.size(before[0]) - self.size(self.best_first[0]) < _LEAST_GAIN


def _part(candidate: Candidate, task: int) -> Outcome:
    assert candidate.outcome is not None
    return candidate.outcome.parts[task]
