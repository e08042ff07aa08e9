r"""How scored candidates compare: what counts as within the tolerance, and how good a candidate of any size is.

The metric on some hundred examples is coarse: its noise is worth several points of size, and picking the best of many
candidates by it picks luck. The expected loss of the label says far more about the metric on *other* examples than the
metric itself does (docs/search.md has the measurement). So the metric decides only at which size the energy allocation
leaves the tolerance (the *limit*), and a candidate is judged by its *departure*: how far its loss lies below that of
the energy allocation of its own size. Does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import isotonic_regression

from optimum_sieve.search.candidate import Outcome
from optimum_sieve.tasks.metrics import standard_error


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from optimum_sieve.search.candidate import Candidate
    from optimum_sieve.search.genome import Genome, SearchSpace


# Kept fractions about a size between which the energy allocation's loss is taken as a line.
_WINDOW = 0.08
# Kept fraction that a nat is worth at most: where the loss hardly rises, its noise must not be taken for size.
_LARGEST_EXCHANGE = 10.0


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is searched.

    Args:
        tolerance (`float`): Loss accepted, in points of the metric.
        confidence (`float`): One-sided confidence of the confirmation.
        confirm_counts (`tuple[int, ...]`): Examples of each task on which the result will be confirmed.
        kept (`float`, *optional*): Kept fraction asked for; `None`: the least within the tolerance.
    """

    tolerance: float
    confidence: float
    confirm_counts: tuple[int, ...]
    kept: float | None = None

    @property
    def num_tasks(self) -> int:
        """Number of tasks that the result is to do."""
        return len(self.confirm_counts)

    def of_task(self, place: int) -> Goal:
        """Return the goal of a single task."""
        return replace(self, confirm_counts=(self.confirm_counts[place],))


def room(outcome: Outcome, goal: Goal) -> float:
    """Return how far a confirmation would lie within the tolerance, in points of the metric; below 0: it would fail.

    That is if its mean were the expected one, and its scatter that of `outcome`.
    """
    margin = outcome.mean - outcome.bound(goal.confidence, goal.confirm_counts[0])
    return outcome.expected - margin + goal.tolerance


@dataclass(frozen=True, eq=False)
class Standing:
    """All scored candidates of some generations, compared by their outcomes on one task.

    Args:
        space (`SearchSpace`): The space.
        scored (`tuple[Candidate, ...]`): Candidates with outcomes on the task, the energy seeds among them.
        goal (`Goal`): What is searched, of this task.
    """

    space: SearchSpace
    scored: tuple[Candidate, ...]
    goal: Goal

    @cached_property
    def complete(self) -> list[Candidate]:
        """Candidates that were not dropped."""
        return [candidate for candidate in self.scored if candidate.outcome and candidate.outcome.complete]

    def rise(self, candidate: Candidate) -> float:
        """Rise of the loss on all examples; of a dropped candidate as estimated from those it was scored on.

        How much harder those are than all is known from the complete candidates.
        """
        outcome = _outcome(candidate)
        if outcome.complete or self._reference is None:
            return outcome.rise
        first = float(self._reference[: outcome.count].mean())
        return outcome.rise - first + float(self._reference.mean())

    def noise(self, candidate: Candidate) -> float:
        """Standard error of a candidate's rise beside what all candidates share, as they see the same examples."""
        rises = _outcome(candidate).rises
        return standard_error(rises if self._reference is None else rises - self._reference[: len(rises)])

    @cached_property
    def _reference(self) -> NDArray[np.float64] | None:
        complete = [_outcome(candidate).rises for candidate in self.complete]
        return np.mean(complete, axis=0) if complete else None

    @cached_property
    def _seeds(self) -> list[tuple[float, float, float, float]]:
        """Kept fraction, predicted loss, rise and room of the dense model and the energy seeds, by falling size."""
        seeds = [
            (
                self.space.kept(candidate.genome),
                float(self.space.losses(candidate.genome).sum()),
                self.rise(candidate),
                room(_outcome(candidate), self.goal),
            )
            for candidate in self.scored
            if candidate.origin == "energy" and candidate.outcome
        ]
        return sorted([*seeds, (1.0, 0.0, 0.0, self.goal.tolerance)], reverse=True)

    @cached_property
    def _energy(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Kept fraction, predicted loss and rise along the energy allocation, by falling size.

        A little pruning can lower the loss. What counts is how it rises from its lowest on, to smaller models; sizes
        above count as that lowest.
        """
        kept, predicted, rises, _ = np.array(self._seeds).T
        return kept, predicted, np.minimum.accumulate(rises[::-1])[::-1]

    def predicted_rise(self, predicted: float) -> float:
        """Rise that goes with a predicted loss along the energy allocation; beyond its smallest seed as before that."""
        _, known, rises = self._energy
        if predicted > known[-1] > known[-2]:
            slope = (rises[-1] - rises[-2]) / (known[-1] - known[-2])
            return float(rises[-1] + slope * (predicted - known[-1]))
        return float(np.interp(predicted, known, rises))

    def energy_rise(self, size: float) -> float:
        """Rise of the energy allocation at a kept fraction, between its seeds by the predicted loss."""
        kept, predicted, _ = self._energy
        if size > kept[1]:
            return self.predicted_rise(float(np.interp(size, kept[1::-1], predicted[1::-1])))
        logs = np.log(np.maximum(predicted[1:], 1e-300))
        return self.predicted_rise(float(np.exp(np.interp(size, kept[:0:-1], logs[::-1]))))

    @cached_property
    def energy_size(self) -> float:
        """Kept fraction at which the energy allocation leaves the tolerance; the size asked for, where one is.

        Interpolated where the room, made to fall with size, crosses 0.
        """
        if self.goal.kept is not None:
            return self.goal.kept
        kept, _, _, rooms = np.array(self._seeds).T
        falling = isotonic_regression(rooms, increasing=False).x
        below = int((falling >= 0).sum())
        if below in (0, len(kept)):
            return float(kept[max(below - 1, 0)])
        share = falling[below - 1] / (falling[below - 1] - falling[below])
        return float(kept[below - 1] + share * (kept[below] - kept[below - 1]))

    @cached_property
    def exchange(self) -> float:
        """Kept fraction that a nat is worth, around the limit."""
        low = max(self.energy_size - _WINDOW, float(self._energy[0].min()))
        high = min(self.energy_size + _WINDOW, 1.0)
        fall = self.energy_rise(low) - self.energy_rise(high)
        return float(min((high - low) / fall, _LARGEST_EXCHANGE)) if fall > 0 else _LARGEST_EXCHANGE

    def departure(self, candidate: Candidate) -> float:
        """Rise of the loss beyond that of the energy allocation of the same size, in nats; below 0 is better."""
        return self.rise(candidate) - self.energy_rise(self.space.kept(candidate.genome))

    def predicted_departure(self, genome: Genome) -> float:
        """Departure that the predicted losses alone say."""
        predicted = self.predicted_rise(float(self.space.losses(genome).sum()))
        return predicted - self.energy_rise(self.space.kept(genome))


def _outcome(candidate: Candidate) -> Outcome:
    """Return a candidate's outcome on one task."""
    assert isinstance(candidate.outcome, Outcome)
    return candidate.outcome


def is_stagnant(bests: Sequence[float], patience: int, least_gain: float) -> bool:
    """Whether the last `patience` entries of a falling sequence brought less than `least_gain`.

    Example:

    ```python
    >>> is_stagnant([0.5, 0.4, 0.4, 0.4], patience=2, least_gain=0.002)
    True

    ```
    """
    return len(bests) > patience and bests[-1 - patience] - bests[-1] < least_gain
