"""A candidate of the search and what scoring it gave. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve.tasks.metrics import standard_error


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .genome import Genome


_ARRAYS = ("differences", "rises")

SEARCH, CONFIRM, BOTTLENECK = "search", "confirm", "bottleneck"


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """Scores of a candidate on some first examples of one part of the selection split.

    Args:
        mean (`float`): Score minus the dense model's, in points of the metric.
        expected (`float`): `mean` without the chance of the gold labels (see `expected_difference`).
        differences (`numpy.ndarray` of shape `(count,)`): What each example adds to `mean`.
        agreement (`float`): Fraction of examples with the dense model's prediction.
        rises (`numpy.ndarray` of shape `(count,)`):
            Negative log-likelihood of each example's label, among its candidates, minus the dense model's; expected
            under the calibrated labels (see `expected_rises`).
        kl (`float`): Mean KL to the dense model, in nats.
        complete (`bool`): Whether all examples of the part were scored; `False` where the candidate was dropped.
    """

    mean: float
    expected: float
    differences: NDArray[np.float64]
    agreement: float
    rises: NDArray[np.float64]
    kl: float
    complete: bool

    @property
    def parts(self) -> tuple[Outcome, ...]:
        """The outcomes of single tasks: itself."""
        return (self,)

    @property
    def worst(self) -> Outcome:
        """The outcome of the task that the mean is of: itself."""
        return self

    @property
    def count(self) -> int:
        """Number of examples scored."""
        return len(self.rises)

    @property
    def standard_error(self) -> float:
        """Standard error of `mean`."""
        return standard_error(self.differences)

    @property
    def rise(self) -> float:
        """Mean rise of the loss, in nats."""
        return float(self.rises.mean())

    def bound(self, confidence: float, count: int | None = None) -> float:
        """Return the one-sided lower bound of the score difference; as it would be on `count` examples, if given.

        By the normal approximation, with a standard error of one changed example at least: where no example differs,
        few examples still say little.
        """
        scale = (self.count / count) ** 0.5 if count else 1.0
        error = max(self.standard_error, 1 / self.count)
        return self.mean - NormalDist().inv_cdf(confidence) * error * scale

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        arrays = {name: [float(f"{value:.6g}") for value in getattr(self, name)] for name in _ARRAYS}
        return {**vars(self), **arrays}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Outcome:
        """Make an outcome from `to_dict`'s output."""
        return cls(**values | {name: np.array(values[name], dtype=np.float64) for name in _ARRAYS})


@dataclass(frozen=True, eq=False)
class JointOutcome:
    """Scores of a candidate on several tasks, of which the worst counts.

    Args:
        parts (`tuple[Outcome, ...]`): Those of each task, in order.
    """

    parts: tuple[Outcome, ...]

    @property
    def worst(self) -> Outcome:
        """The outcome of the task with the lowest score difference."""
        return min(self.parts, key=lambda part: part.mean)

    @property
    def count(self) -> int:
        """Number of examples scored, over all tasks."""
        return sum(part.count for part in self.parts)

    @property
    def complete(self) -> bool:
        """Whether all examples of all tasks were scored."""
        return all(part.complete for part in self.parts)

    @property
    def mean(self) -> float:
        """The lowest score difference."""
        return self.worst.mean

    @property
    def expected(self) -> float:
        """The lowest expected difference."""
        return min(part.expected for part in self.parts)

    @property
    def standard_error(self) -> float:
        """Standard error of `mean`."""
        return self.worst.standard_error

    @property
    def agreement(self) -> float:
        """The lowest agreement."""
        return min(part.agreement for part in self.parts)

    @property
    def rise(self) -> float:
        """The largest rise of the loss, in nats."""
        return max(part.rise for part in self.parts)

    @property
    def kl(self) -> float:
        """The largest mean KL, in nats."""
        return max(part.kl for part in self.parts)

    def bound(self, confidence: float) -> float:
        """Return the lowest of the tasks' lower bounds: no correction for their number is needed, as all must hold."""
        return min(part.bound(confidence) for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return {"parts": [part.to_dict() for part in self.parts]}


AnyOutcome = Outcome | JointOutcome


def joined(parts: Sequence[Outcome]) -> AnyOutcome:
    """Return the outcome on all tasks; of a single one its own."""
    return parts[0] if len(parts) == 1 else JointOutcome(tuple(parts))


def read_outcome(values: dict[str, Any]) -> AnyOutcome:
    """Make an outcome from `to_dict`'s output."""
    return joined([Outcome.from_dict(part) for part in values.get("parts", [values])])


@dataclass(frozen=True, eq=False, kw_only=True)
class Rival:
    """What a candidate must keep up with on one task, or be dropped.

    Args:
        rises (`numpy.ndarray` of shape `(count,)`): The rival's rise of the loss on every search example.
        allowance (`float`): What a candidate may lie above that, as it is smaller; in nats.
    """

    rises: NDArray[np.float64]
    allowance: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """A genome and its place in the search.

    Args:
        genome (`tuple[int, ...]`): A level for every matrix.
        part (`str`): `"search"`, `"confirm"` or `"bottleneck"`: what it is scored for, and on which examples.
        generation (`int`): Generation it belongs to, or its step of the confirmation.
        slot (`int`): Place in its generation.
        origin (`str`): How it was made.
        rival (`tuple[int, int]`, *optional*): Generation and slot of the candidate it must keep up with.
        allowances (`tuple[float, ...]`): See `Rival`; one for each task.
        outcome (`Outcome` or `JointOutcome`, *optional*): Its scores, once there.
    """

    genome: Genome
    part: str
    generation: int
    slot: int
    origin: str
    rival: tuple[int, int] | None = None
    allowances: tuple[float, ...] = ()
    outcome: AnyOutcome | None = None

    @property
    def place(self) -> tuple[str, int, int]:
        """What tells it from every other candidate."""
        return self.part, self.generation, self.slot
