"""Choose a rank for every layer within one parameter budget. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .budget import largest_rank, rank_choices, rank_parameters


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


# Number of price ratios of parameters and seconds to try.
_DIRECTIONS = 9


@dataclass(frozen=True)
class LossCurve:
    """Predicted loss of one layer as a function of its rank.

    Args:
        name (`str`): Name of the layer.
        out_features (`int`): Rows of the weight.
        in_features (`int`): Columns of the weight.
        energy (`numpy.ndarray` of shape `(max_rank,)`): Predicted loss increase per dropped direction, descending.
    """

    name: str
    out_features: int
    in_features: int
    energy: np.ndarray

    @property
    def dense_parameters(self) -> int:
        """Number of parameters of the dense weight."""
        return self.out_features * self.in_features

    def choices(self, storage: str, multiple: int) -> tuple[list[int | None], np.ndarray, np.ndarray]:
        """Return all rank choices (`None` = dense) with their parameters and predicted losses; dense is last."""
        ranks: list[int | None] = [*rank_choices(self.out_features, self.in_features, storage, multiple), None]
        tail = np.concatenate([np.cumsum(self.energy[::-1])[::-1], [0.0]])
        shape = (self.out_features, self.in_features)
        parameters = [self.dense_parameters if r is None else rank_parameters(r, *shape, storage) for r in ranks]
        losses = [0.0 if r is None else float(tail[r]) for r in ranks]
        return ranks, np.array(parameters, dtype=np.float64), np.array(losses)


@dataclass(frozen=True)
class LatencyBudget:
    """Latency limit for all layers together.

    Args:
        seconds (`Mapping[str, numpy.ndarray]`): Seconds of each of a layer's [`LossCurve.choices`], by layer name.
        target (`float`): Limit as a fraction of the dense layers' latency.
    """

    seconds: Mapping[str, np.ndarray]
    target: float

    @property
    def dense(self) -> float:
        """Seconds of all dense layers."""
        return float(sum(seconds[-1] for seconds in self.seconds.values()))

    @property
    def limit(self) -> float:
        """Maximum seconds."""
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
    """Return a rank for every layer, `None` for dense; the sum of parameters stays within `budget`.

    Args:
        curves (`Sequence[LossCurve]`): One per layer.
        budget (`int`): Maximum parameters of all layers together.
        allocation (`str`): `"energy"` (least predicted loss) or `"uniform"` (same kept fraction in every layer).
        storage (`str`): `"pivoted"` or `"factors"`.
        multiple (`int`): Ranks are multiples of this number.
        latency ([`LatencyBudget`], *optional*): Additional latency limit; `"energy"` only.

    Raises:
        ValueError: If `budget` is negative, a predicted loss is not finite, or no ranks meet the latency limit.
    """
    if budget < 0:
        raise ValueError(f"`budget` must be at least 0, got {budget}.")
    for curve in curves:
        if not np.isfinite(curve.energy).all():
            raise ValueError(f"The energy of `{curve.name}` must be finite, got NaN or infinity. Calibrate in float32.")
    if allocation == "uniform":
        return allocate_uniform(curves, budget, storage=storage, multiple=multiple)
    return allocate_energy(curves, budget, storage=storage, multiple=multiple, latency=latency)


def predicted_loss(curves: Sequence[LossCurve], ranks: Mapping[str, int | None]) -> float:
    """Return the predicted loss of all layers together at `ranks` (`None` = dense)."""
    losses = (curve.energy[rank:].sum() for curve in curves if (rank := ranks[curve.name]) is not None)
    return float(sum(losses))


def allocate_uniform(
    curves: Sequence[LossCurve], budget: int, *, storage: str = "pivoted", multiple: int = 8
) -> dict[str, int | None]:
    """Keep the same fraction of every layer, rounded down to the rank multiple; dense only if everything fits."""
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

    Every layer minimizes loss + price * parameters over all its choices, including rank 0 and dense. Bisection finds
    one price for all layers (a Lagrange multiplier). This visits the convex hull of each layer's curve, so single
    upgrades then spend the remaining budget, those that save the most loss per parameter first. With `latency`, several
    price ratios of parameters and seconds are tried and the best result is kept.

    Raises:
        ValueError: If no ranks meet the latency limit.
    """
    problem = _Problem.of(curves, budget, storage, multiple, latency)
    candidates = [problem.solve(direction) for direction in problem.directions()]
    # With few layers the hulls have few points, and between two of them the uniform allocation can be better.
    uniform_ranks = allocate_uniform(curves, budget, storage=storage, multiple=multiple)
    uniform = [ranks.index(uniform_ranks[curve.name]) for curve, ranks in zip(curves, problem.ranks, strict=True)]
    picks = min([*candidates, *([uniform] if problem.fits(uniform) else [])], key=problem.loss)
    return {curve.name: ranks[pick] for curve, ranks, pick in zip(curves, problem.ranks, picks, strict=True)}


@dataclass(frozen=True)
class _Problem:
    """Choices of every layer with their costs and losses, and the limits on the total costs.

    Args:
        ranks (`list[list]`): Rank choices of each layer, `None` = dense.
        costs (`list[numpy.ndarray]` of shape `(choices, budgets)`): Parameters and, with a latency limit, seconds.
        losses (`list[numpy.ndarray]`): Predicted losses.
        limits (`numpy.ndarray` of shape `(budgets,)`): Maximum total costs.
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
            least = sum(seconds[0] for seconds in times)
            if least > latency.limit:
                raise ValueError(
                    f"`latency_target` must be at least {least / latency.dense:.2f} here, the latency of layers of "
                    f"rank 0, got {latency.target:.2f}. Raise it."
                )
            costs = [
                np.column_stack([parameters, seconds])
                for (_, parameters, _), seconds in zip(tables, times, strict=True)
            ]
            limits = np.array([float(budget), latency.limit])
        return cls([ranks for ranks, _, _ in tables], costs, [losses for _, _, losses in tables], limits)

    def directions(self) -> list[np.ndarray]:
        """List the price ratios to try; the dense layers' seconds are worth as much as their parameters."""
        if len(self.limits) == 1:
            return [np.ones(1)]
        parameters, seconds = sum(costs[-1] for costs in self.costs)
        return [np.array([1 - share, share * parameters / seconds]) for share in np.linspace(0, 1, _DIRECTIONS)]

    def spent(self, picks: Sequence[int]) -> np.ndarray:
        """Add up the costs of all layers."""
        total: np.ndarray = sum(costs[pick] for costs, pick in zip(self.costs, picks, strict=True))
        return total

    def fits(self, picks: Sequence[int]) -> bool:
        """Return whether the total costs are within the limits."""
        return bool((self.spent(picks) <= self.limits).all())

    def loss(self, picks: Sequence[int]) -> float:
        """Add up the predicted losses."""
        return float(sum(losses[pick] for losses, pick in zip(self.losses, picks, strict=True)))

    def solve(self, direction: np.ndarray) -> list[int]:
        """Find the lowest price in this direction at which everything fits, and spend the remaining budget."""
        combined = [costs @ direction for costs in self.costs]

        def choose(price: float) -> list[int]:
            # Ties go to the fewest parameters: choices ascend in parameters and argmin returns the first.
            return [int(np.argmin(losses + price * cost)) for losses, cost in zip(self.losses, combined, strict=True)]

        picks = choose(0.0)
        if not self.fits(picks):
            # Prices at which every layer is dense and at which every layer has the cheapest choice.
            largest = max(max(float(losses.max()) for losses in self.losses), 1e-300)
            low, high = largest * 1e-30, largest * 10
            for _ in range(100):
                price = (low * high) ** 0.5
                low, high = (low, price) if self.fits(choose(price)) else (price, high)
            picks = choose(high)
            if not self.fits(picks):
                # If a dense layer is faster than its factors, the combined cost can miss one limit: use rank 0.
                picks = [0] * len(picks)
        return self._spend_rest(picks, direction)

    def _spend_rest(self, picks: list[int], direction: np.ndarray) -> list[int]:
        """Upgrade single layers, most loss saved per cost first, while an upgrade fits."""
        picks, rest = list(picks), self.limits - self.spent(picks)
        while True:
            best, best_rate = None, 0.0
            for index, (costs, losses, pick) in enumerate(zip(self.costs, self.losses, picks, strict=True)):
                more = costs - costs[pick]
                fits = (more <= rest).all(axis=1) & (losses < losses[pick])
                if not fits.any():
                    continue
                # An upgrade that saves time, such as to dense, may have no cost.
                rates = np.where(fits, (losses[pick] - losses) / np.maximum(more @ direction, 1e-12), 0.0)
                choice = int(np.argmax(rates))
                if rates[choice] > best_rate:
                    best, best_rate = (index, choice), float(rates[choice])
            if best is None:
                return picks
            index, choice = best
            rest = rest - (self.costs[index][choice] - self.costs[index][picks[index]])
            picks[index] = choice
