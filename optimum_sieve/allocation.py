"""Choose a rank for every layer under one parameter budget. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .budget import largest_rank, rank_choices, rank_parameters


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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


def allocate(
    curves: Sequence[LossCurve], budget: int, *, allocation: str = "energy", storage: str = "pivoted", multiple: int = 8
) -> dict[str, int | None]:
    """Return a rank for every layer, `None` where it stays dense; all together within `budget` parameters.

    Args:
        curves (`Sequence[LossCurve]`): One per layer.
        budget (`int`): Parameters allowed for all layers together.
        allocation (`str`): `"energy"` (least predicted loss) or `"uniform"` (same kept fraction in every layer).
        storage (`str`): `"pivoted"` or `"factors"`.
        multiple (`int`): Ranks are multiples of this number.

    Raises:
        ValueError: If `budget` is negative, or the predicted losses are not finite.
    """
    if budget < 0:
        raise ValueError(f"`budget` must be at least 0, got {budget}.")
    for curve in curves:
        if not np.isfinite(curve.energy).all():
            raise ValueError(f"The energy of `{curve.name}` must be finite. Calibrate in float32.")
    if allocation == "uniform":
        return allocate_uniform(curves, budget, storage=storage, multiple=multiple)
    return allocate_energy(curves, budget, storage=storage, multiple=multiple)


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
    curves: Sequence[LossCurve], budget: int, *, storage: str = "pivoted", multiple: int = 8
) -> dict[str, int | None]:
    r"""Minimize the summed predicted loss within `budget`; never worse than `allocate_uniform`.

    Every layer minimizes loss + price * parameters over all its choices; one price, found by bisection, serves all
    layers (a Lagrange multiplier). That visits the convex hull of each layer's curve; what the last step of the price
    leaves unspent goes to the single upgrades that save the most loss per parameter. Rank 0 and dense are choices.
    """
    tables = [curve.choices(storage, multiple) for curve in curves]

    def choose(price: float) -> list[int]:
        # Among equal costs the fewest parameters: choices ascend in parameters and argmin takes the first.
        return [int(np.argmin(losses + price * parameters)) for _, parameters, losses in tables]

    def spent(picks: Sequence[int]) -> float:
        return float(sum(table[1][pick] for table, pick in zip(tables, picks, strict=True)))

    picks = choose(0.0)
    if spent(picks) > budget:
        low, high = _price_bounds(tables)
        for _ in range(100):
            price = (low * high) ** 0.5
            low, high = (low, price) if spent(choose(price)) <= budget else (price, high)
        picks = choose(high)
    picks = _spend_rest(tables, picks, budget - spent(picks))
    # Between two points of the hulls, which matters with few layers, equal fractions can be the better choice.
    uniform = allocate_uniform(curves, budget, storage=storage, multiple=multiple)
    equal = [table[0].index(uniform[curve.name]) for curve, table in zip(curves, tables, strict=True)]
    picks = min(picks, equal, key=lambda picks: sum(table[2][pick] for table, pick in zip(tables, picks, strict=True)))
    return {curve.name: table[0][pick] for curve, table, pick in zip(curves, tables, picks, strict=True)}


Table = tuple[list[int | None], np.ndarray, np.ndarray]


def _price_bounds(tables: Sequence[Table]) -> tuple[float, float]:
    """Return two positive prices: one at which everything is bought, one at which nothing is."""
    largest = max(float(losses.max()) for _, _, losses in tables)
    return max(largest, 1e-300) * 1e-30, max(largest, 1e-300) * 10


def _spend_rest(tables: Sequence[Table], picks: list[int], rest: float) -> list[int]:
    """Upgrade single layers, best saving per parameter first, while an upgrade fits into `rest` parameters."""
    picks = list(picks)
    while True:
        best, best_rate = None, 0.0
        for index, ((_, parameters, losses), pick) in enumerate(zip(tables, picks, strict=True)):
            cost = parameters - parameters[pick]
            fits = (cost > 0) & (cost <= rest) & (losses < losses[pick])
            if not fits.any():
                continue
            rates = np.where(fits, (losses[pick] - losses) / np.where(cost > 0, cost, 1.0), 0.0)
            choice = int(np.argmax(rates))
            if rates[choice] > best_rate:
                best, best_rate = (index, choice), float(rates[choice])
        if best is None:
            return picks
        index, choice = best
        rest -= float(tables[index][1][choice] - tables[index][1][picks[index]])
        picks[index] = choice
