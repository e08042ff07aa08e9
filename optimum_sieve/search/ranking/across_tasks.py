r"""How scored candidates compare over all tasks: the worst one counts. Does not import torch.

Each task has a limit of its own, the size at which the energy allocation leaves the tolerance on it, and a rate at
which departures from the energy allocation are worth size. So each task says at which size a candidate's allocation
would leave the tolerance, and the largest of these sizes counts: at any smaller one some task is not held. Of one task
it is that task's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from .by_task import Standing


if TYPE_CHECKING:
    from optimum_sieve.search.candidate import Candidate
    from optimum_sieve.search.genome import Genome, SearchSpace

    from .by_task import Goal


# Candidates farther from the limit than this kept fraction say little about it.
_NEAR = 0.15


@dataclass(frozen=True, eq=False)
class Standings:
    """All scored candidates of some generations, compared.

    Args:
        space (`SearchSpace`): The space.
        scored (`tuple[Candidate, ...]`): Candidates with outcomes, the energy seeds among them.
        goal (`Goal`): What is searched.
    """

    space: SearchSpace
    scored: tuple[Candidate, ...]
    goal: Goal

    @cached_property
    def tasks(self) -> list[Standing]:
        """The candidates compared on each task."""
        return [
            Standing(
                self.space, tuple(_on_task(candidate, place) for candidate in self.scored), self.goal.of_task(place)
            )
            for place in range(self.goal.num_tasks)
        ]

    @cached_property
    def complete(self) -> list[Candidate]:
        """Candidates that were not dropped."""
        return [candidate for candidate in self.scored if candidate.outcome and candidate.outcome.complete]

    @cached_property
    def energy_size(self) -> float:
        """Kept fraction at which the energy allocation, as it shrinks, leaves the tolerance on some task."""
        return max(task.energy_size for task in self.tasks)

    def excesses(self, candidate: Candidate) -> list[float]:
        """Return for each task the kept fraction, beyond `energy_size`, at which the candidate is at its limit."""
        return [
            self._behind(task) + task.exchange * task.departure(_on_task(candidate, place))
            for place, task in enumerate(self.tasks)
        ]

    def excess(self, candidate: Candidate) -> float:
        """Kept fraction beyond `energy_size` at which the candidate's allocation would reach the limit."""
        return max(self.excesses(candidate))

    def size(self, candidate: Candidate) -> float:
        """Kept fraction at which the candidate's allocation would reach the limit."""
        return self.energy_size + self.excess(candidate)

    def predicted_excess(self, genome: Genome) -> float:
        """What `excess` would be if the predicted losses alone counted."""
        return max(self._behind(task) + task.exchange * task.predicted_departure(genome) for task in self.tasks)

    def noise(self, candidate: Candidate) -> float:
        """Standard error of a candidate's excess, beside what all candidates share."""
        excesses = self.excesses(candidate)
        place = excesses.index(max(excesses))
        return self.tasks[place].noise(_on_task(candidate, place)) * self.tasks[place].exchange

    def allowances(self, genome: Genome, rival: Candidate) -> tuple[float, ...]:
        """Return how far the loss of a genome may lie above a rival's on each task, so that its size is no larger."""
        kept, excesses = self.space.kept, self.excesses(rival)
        return tuple(
            task.energy_rise(kept(genome))
            - task.energy_rise(kept(rival.genome))
            + (max(excesses) - own) / task.exchange
            for task, own in zip(self.tasks, excesses, strict=True)
        )

    def _behind(self, task: Standing) -> float:
        """How far a task's limit lies below that of the task whose is the largest, in kept fraction; at most 0."""
        return task.energy_size - self.energy_size

    @cached_property
    def near(self) -> list[Candidate]:
        """Candidates whose size is near that of the energy allocation at the limit."""
        return [c for c in self.scored if abs(self.space.kept(c.genome) - self.energy_size) < _NEAR]

    @cached_property
    def ranking(self) -> list[Candidate]:
        """Complete candidates, best first: those near the limit, and within the size asked for, where there are any."""
        most = 1.0 if self.goal.kept is None else self.goal.kept
        within = [c for c in self.near if c.outcome and self.space.kept(c.genome) <= most]
        near = [candidate for candidate in within if candidate.outcome and candidate.outcome.complete]
        return sorted(near or self.complete, key=lambda candidate: (self.excess(candidate), candidate.place))

    def best_size_by_generation(self) -> list[float]:
        """Best size reached up to each generation."""
        last = max((candidate.generation for candidate in self.scored), default=-1)
        return [
            min((self.size(c) for c in self.ranking if c.generation <= generation), default=float("inf"))
            for generation in range(last + 1)
        ]


def _on_task(candidate: Candidate, place: int) -> Candidate:
    """Return the candidate with its outcome on one task."""
    return replace(candidate, outcome=candidate.outcome and candidate.outcome.parts[place])
