"""A candidate of the search and what scoring it gave. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve.tasks.metrics import standard_error


if TYPE_CHECKING:
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


@dataclass(frozen=True, eq=False, kw_only=True)
class Rival:
    """What a candidate must keep up with, or be dropped.

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
        allowance (`float`): See `Rival`.
        outcome (`Outcome`, *optional*): Its scores, once there.
    """

    genome: Genome
    part: str
    generation: int
    slot: int
    origin: str
    rival: tuple[int, int] | None = None
    allowance: float = 0.0
    outcome: Outcome | None = None

    @property
    def place(self) -> tuple[str, int, int]:
        """What tells it from every other candidate."""
        return self.part, self.generation, self.slot
