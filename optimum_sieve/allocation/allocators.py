"""Choose a rank for every layer under one parameter budget. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .budget import largest_rank, rank_choices, rank_parameters


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


# Proportions in which parameters and seconds are priced.
_DIRECTIONS = 9


@dataclass(frozen=True)
class LossCurve:
    """Predicted loss of one layer against its rank.

    Args:
        name (`str`): The layer.
        out_features (`int`): Rows of its weight.
        in_features (`int`): Columns of its weight.
        energy (`numpy.ndarray` of shape `(max_rank,)`): Predicted rise of the loss per dropped direction, descending.
    """

    name: str
    out_features: int
    in_features: int
    energy: np.ndarray

    @property
    def dense_parameters(self) -> int:
        """Parameters of the weight when it is left dense."""
        return self.out_features * self.in_features

    def choices(self, storage: str, multiple: int) -> tuple[list[int | None], np.ndarray, np.ndarray]:
        """Return ranks (`None` = dense), parameters and predicted losses of everything the layer can be."""
        ranks: list[int | None] = [*rank_choices(self.out_features, self.in_features, storage, multiple), None]
        tail = np.concatenate([np.cumsum(self.energy[::-1])[::-1], [0.0]])
        shape = (self.out_features, self.in_features)
        parameters = [self.dense_parameters if r is None else rank_parameters(r, *shape, storage) for r in ranks]
        losses = [0.0 if r is None else float(tail[r]) for r in ranks]
        return ranks, np.array(parameters, dtype=np.float64), np.array(losses)


@dataclass(frozen=True)
class LatencyBudget:
    """Seconds that all layers together may take.

    Args:
        seconds (`Mapping[str, numpy.ndarray]`): By layer, of each of its [`LossCurve.choices`]; the last is dense.
        target (`float`): Part of what all dense layers take.
    """

    seconds: Mapping[str, np.ndarray]
    target: float

    @property
    def dense(self) -> float:
        """Seconds of all layers when they are left dense."""
        return float(sum(own[-1] for own in self.seconds.values()))

    @property
    def limit(self) -> float:
        """Seconds allowed."""
        return self.target * self.dense


def allocate(
    curves: Sequence[LossCurve],
    budget: int,
    *,
    allocation: str = "energy",
    storage: str = "pivoted",
    multiple: int = 8,
    latency: LatencyBudget | None = None,
) -> dict[str, int | None]:
    """Return a rank for every layer, `None` where it stays dense; all together within `budget` parameters.

    Args:
        curves (`Sequence[LossCurve]`): One per layer.
        budget (`int`): Parameters allowed for all layers together.
        allocation (`str`): `"energy"` (least predicted loss) or `"uniform"` (same kept fraction in every layer).
        storage (`str`): `"pivoted"` or `"factors"`.
        multiple (`int`): Ranks are multiples of this number.
        latency ([`LatencyBudget`], *optional*): Seconds allowed, too; with `"energy"`.

    Raises:
        ValueError: If `budget` is negative, the predicted losses are not finite, or the latency cannot be reached.
    """
    if budget < 0:
        raise ValueError(f"`budget` must be at least 0, got {budget}.")
    for curve in curves:
        if not np.isfinite(curve.energy).all():
            raise ValueError(f"The energy of `{curve.name}` must be finite. Calibrate in float32.")
    if allocation == "uniform":
        return allocate_uniform(curves, budget, storage=storage, multiple=multiple)
    return allocate_energy(curves, budget, storage=storage, multiple=multiple, latency=latency)


def predicted_loss(curves: Sequence[LossCurve], ranks: Mapping[str, int | None]) -> float:
    """Return the predicted loss of all layers together at these ranks (`None` = dense)."""
    rises = (curve.energy[rank:].sum() for curve in curves if (rank := ranks[curve.name]) is not None)
    return float(sum(rises))


def allocate_uniform(
    curves: Sequence[LossCurve], budget: int, *, storage: str = "pivoted", multiple: int = 8
) -> dict[str, int | None]:
    """Keep the same fraction of every layer, rounded down to the rank multiple; dense only if all fits."""
    total = sum(curve.dense_parameters for curve in curves)
    if budget >= total:
        return {curve.name: None for curve in curves}
    return {
        curve.name: largest_rank(
            budget * curve.dense_parameters // total, curve.out_features, curve.in_features, storage, multiple
        )
        for curve in curves
    }


def allocate_energy(
    curves: Sequence[LossCurve],
    budget: int,
    *,
    storage: str = "pivoted",
    multiple: int = 8,
    latency: LatencyBudget | None = None,
) -> dict[str, int | None]:
    r"""Minimize the summed predicted loss within `budget`; without `latency`, never worse than `allocate_uniform`.

    Every layer minimizes loss + price * parameters over all its choices; one price, found by bisection, serves all
    layers (a Lagrange multiplier). That visits the convex hull of each layer's curve; what the last step of the price
    leaves unspent goes to the single upgrades that save the most loss per parameter. Rank 0 and dense are choices.
    With `latency` the price is of parameters and seconds in several proportions, of which the best is taken.

    Raises:
        ValueError: If the latency cannot be reached.
    """
    problem = _Problem.of(curves, budget, storage, multiple, latency)
    candidates = [problem.solve(direction) for direction in problem.directions()]
    # Between two points of the hulls, which matters with few layers, equal fractions can be the better choice.
    uniform = allocate_uniform(curves, budget, storage=storage, multiple=multiple)
    equal = [ranks.index(uniform[curve.name]) for curve, ranks in zip(curves, problem.ranks, strict=True)]
    picks = min([*candidates, *([equal] if problem.fits(equal) else [])], key=problem.loss)
    return {curve.name: ranks[pick] for curve, ranks, pick in zip(curves, problem.ranks, picks, strict=True)}


@dataclass(frozen=True)
class _Problem:
    """Choices of every layer, what they cost, and how much all may cost.

    Args:
        ranks (`list[list]`): Of each layer, `None` = dense.
        costs (`list[numpy.ndarray]` of shape `(choices, budgets)`): Parameters and, with a latency, seconds.
        losses (`list[numpy.ndarray]`): Predicted losses.
        limits (`numpy.ndarray` of shape `(budgets,)`): Of the sums of the costs.
    """

    ranks: list[list[int | None]]
    costs: list[np.ndarray]
    losses: list[np.ndarray]
    limits: np.ndarray

    @classmethod
    def of(
        cls, curves: Sequence[LossCurve], budget: int, storage: str, multiple: int, latency: LatencyBudget | None
    ) -> _Problem:
        tables = [curve.choices(storage, multiple) for curve in curves]
        costs = [parameters[:, None] for _, parameters, _ in tables]
        limits = np.array([float(budget)])
        if latency is not None:
            times = [latency.seconds[curve.name] for curve in curves]
            least = sum(own[0] for own in times)
            if least > latency.limit:
                raise ValueError(
                    f"`latency_target` must be at least {least / latency.dense:.2f} here, what layers of rank 0 take, "
                    f"got {latency.target:.2f}. Raise it."
                )
            costs = [np.column_stack([own, seconds]) for (_, own, _), seconds in zip(tables, times, strict=True)]
            limits = np.array([float(budget), latency.limit])
        return cls([ranks for ranks, _, _ in tables], costs, [losses for _, _, losses in tables], limits)

    def directions(self) -> list[np.ndarray]:
        """List the proportions in which costs are priced; seconds are counted as so many parameters as all take."""
        if len(self.limits) == 1:
            return [np.ones(1)]
        parameters, seconds = sum(own[-1] for own in self.costs)
        return [np.array([1 - part, part * parameters / seconds]) for part in np.linspace(0, 1, _DIRECTIONS)]

    def spent(self, picks: Sequence[int]) -> np.ndarray:
        """Add up the costs of all layers."""
        total: np.ndarray = sum(own[pick] for own, pick in zip(self.costs, picks, strict=True))
        return total

    def fits(self, picks: Sequence[int]) -> bool:
        """Tell whether the costs are within the limits."""
        return bool((self.spent(picks) <= self.limits).all())

    def loss(self, picks: Sequence[int]) -> float:
        """Add up the predicted losses."""
        return float(sum(own[pick] for own, pick in zip(self.losses, picks, strict=True)))

    def solve(self, direction: np.ndarray) -> list[int]:
        """Find the least price in this direction at which everything fits, and spend the rest."""
        prices = [own @ direction for own in self.costs]

        def choose(price: float) -> list[int]:
            # Among equal costs the fewest parameters: choices ascend in parameters and argmin takes the first.
            return [int(np.argmin(own + price * cost)) for own, cost in zip(self.losses, prices, strict=True)]

        picks = choose(0.0)
        if not self.fits(picks):
            # Prices at which everything is bought and at which the cheapest is.
            largest = max(max(float(own.max()) for own in self.losses), 1e-300)
            low, high = largest * 1e-30, largest * 10
            for _ in range(100):
                price = (low * high) ** 0.5
                low, high = (low, price) if self.fits(choose(price)) else (price, high)
            picks = choose(high)
            if not self.fits(picks):
                # Where a dense layer is faster than factors, the sum of both costs may leave out one limit: rank 0.
                picks = [0] * len(picks)
        return self._spend_rest(picks, direction)

    def _spend_rest(self, picks: list[int], direction: np.ndarray) -> list[int]:
        """Upgrade single layers, best saving for the price first, while an upgrade fits."""
        picks, rest = list(picks), self.limits - self.spent(picks)
        while True:
            best, best_rate = None, 0.0
            for index, (costs, losses, pick) in enumerate(zip(self.costs, self.losses, picks, strict=True)):
                more = costs - costs[pick]
                fits = (more <= rest).all(axis=1) & (losses < losses[pick])
                if not fits.any():
                    continue
                # An upgrade that saves time, as to a dense layer, may cost nothing.
                rates = np.where(fits, (losses[pick] - losses) / np.maximum(more @ direction, 1e-12), 0.0)
                choice = int(np.argmax(rates))
                if rates[choice] > best_rate:
                    best, best_rate = (index, choice), float(rates[choice])
            if best is None:
                return picks
            index, choice = best
            rest = rest - (self.costs[index][choice] - self.costs[index][picks[index]])
            picks[index] = choice
