"""A candidate of the search and its scores. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve.allocation.certainty import certain_error
from optimum_sieve.metrics.scored import standard_error


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from .genome import Genome


_ARRAYS = ("differences", "rises")

SEARCH, CONFIRM, BOTTLENECK = "search", "confirm", "bottleneck"


@dataclass(frozen=True, eq=False, kw_only=True)
class Outcome:
    """Scores of a candidate on the first examples of one part of the selection split.

    On several tasks, the worst task counts: `mean` and the arrays are those of the task with the lowest mean, the other
    figures are the worst of any task.

    Args:
        mean (`float`): Score minus the dense model's, in points of the metric.
        expected (`float`): `mean` without the chance of the gold labels (see `expected_difference`).
        differences (`numpy.ndarray` of shape `(count,)`): Contribution of each example to `mean`.
        agreement (`float`): Fraction of examples with the dense model's prediction.
        rises (`numpy.ndarray` of shape `(count,)`):
            Negative log-likelihood of each example's label, among its candidates, minus the dense model's; expected
            under the calibrated labels (see `expected_rises`).
        kl (`float`): Mean KL to the dense model, in nats.
        complete (`bool`): Whether all examples of the part were scored; `False` for a dropped candidate.
        tasks (`tuple[Outcome, ...]`): Outcome on each task, if there are several.
    """

    mean: float
    expected: float
    differences: NDArray[np.float64]
    agreement: float
    rises: NDArray[np.float64]
    kl: float
    complete: bool
    tasks: tuple[Outcome, ...] = ()

    @property
    def parts(self) -> tuple[Outcome, ...]:
        """Outcome on each task."""
        return self.tasks or (self,)

    @property
    def count(self) -> int:
        """Number of examples scored, over all tasks."""
        return sum(len(part.rises) for part in self.parts)

    @property
    def standard_error(self) -> float:
        """Standard error of `mean`."""
        return standard_error(self.differences)

    @property
    def rise(self) -> float:
        """Mean rise of the loss, in nats."""
        return max(float(part.rises.mean()) for part in self.parts)

    def bound(self, confidence: float, count: int | None = None) -> float:
        """Return the one-sided lower bound of the score difference; as it would be on `count` examples, if given.

        Few examples without any difference still say little (see `certain_error`). The lowest bound of several tasks
        needs no correction, because all must hold.
        """
        z = NormalDist().inv_cdf(confidence)
        return min(part.mean - z * part._error(count or len(part.rises)) for part in self.parts)

    def _error(self, count: int) -> float:
        scored = len(self.rises)
        return float(certain_error(self.mean, self.standard_error, scored) * (scored / count) ** 0.5)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        if self.tasks:
            return {"tasks": [part.to_dict() for part in self.tasks]}
        arrays = {name: [float(f"{value:.6g}") for value in getattr(self, name)] for name in _ARRAYS}
        return {**vars(self), **arrays}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Outcome:
        """Make an outcome from the output of `to_dict`."""
        if values["tasks"]:
            return joined([cls.from_dict(part) for part in values["tasks"]])
        return cls(**values | {name: np.array(values[name], dtype=np.float64) for name in _ARRAYS} | {"tasks": ()})


def joined(parts: Sequence[Outcome]) -> Outcome:
    """Return the outcome on all tasks."""
    if len(parts) == 1:
        return parts[0]
    worst = min(parts, key=lambda part: part.mean)
    return Outcome(
        mean=worst.mean,
        expected=min(part.expected for part in parts),
        differences=worst.differences,
        agreement=min(part.agreement for part in parts),
        rises=worst.rises,
        kl=max(part.kl for part in parts),
        complete=all(part.complete for part in parts),
        tasks=tuple(parts),
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """A genome and its slot in a generation of the search, or in a step of the confirmation.

    `part` is `"search"`, `"confirm"` or `"bottleneck"`, which decides on the examples; `origin` says how it was made.
    """

    genome: Genome
    part: str
    generation: int
    slot: int
    origin: str
    outcome: Outcome | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """Part, generation and slot, which identify a candidate."""
        return self.part, self.generation, self.slot

    @property
    def is_complete(self) -> bool:
        """Whether it was scored on all examples."""
        return self.outcome is not None and self.outcome.complete


def of_part(candidates: Iterable[Candidate], part: str) -> list[Candidate]:
    """Return the candidates of one part."""
    return [candidate for candidate in candidates if candidate.part == part]
