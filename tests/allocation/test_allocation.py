"""Rank allocation, against every combination of ranks on small problems."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from optimum_sieve.allocation.allocators import LatencyBudget, LossCurve, allocate, allocate_energy, allocate_uniform
from optimum_sieve.allocation.budget import rank_choices, rank_parameters


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


ROUNDING = 1e-9


def make_curves(rng: np.random.Generator, layers: int, low: int = 3, high: int = 9) -> list[LossCurve]:
    """Make layers of random shapes with energies of very different sizes and decays."""
    curves = []
    for number in range(layers):
        out_features, in_features = (int(size) for size in rng.integers(low, high, size=2))
        energy = rng.exponential(size=min(out_features, in_features)) ** rng.integers(1, 5)
        energy = np.sort(energy)[::-1] * 10.0 ** rng.uniform(-2, 2)
        curves.append(LossCurve(f"layer.{number}", out_features, in_features, energy))
    return curves


def measure(curves: Sequence[LossCurve], ranks: Mapping[str, int | None], storage: str) -> tuple[int, float]:
    """Return the parameters and the predicted loss of `ranks`."""
    parameters, loss = 0, 0.0
    for curve in curves:
        rank = ranks[curve.name]
        shape = (curve.out_features, curve.in_features)
        parameters += rank_parameters(0 if rank is None else rank, *shape, "dense" if rank is None else storage)
        loss += 0.0 if rank is None else float(curve.energy[rank:].sum())
    return parameters, loss


def every_allocation(curves: Sequence[LossCurve], storage: str, multiple: int) -> list[tuple[int, float]]:
    """Return the parameters and the predicted loss of every combination of ranks."""
    choices = [[*rank_choices(c.out_features, c.in_features, storage, multiple), None] for c in curves]
    names = [curve.name for curve in curves]
    return [measure(curves, dict(zip(names, ranks, strict=True)), storage) for ranks in itertools.product(*choices)]


def least_loss(points: Sequence[tuple[int, float]], budget: float) -> float:
    return min((loss for parameters, loss in points if parameters <= budget), default=float("inf"))


def on_hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the points that are least in loss + price * parameters for some price, by parameters."""
    hull: list[tuple[int, float]] = []
    for point in sorted(points):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(first: tuple[int, float], second: tuple[int, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


@pytest.fixture(params=range(12))
def problem(request: pytest.FixtureRequest) -> tuple[list[LossCurve], str, int]:
    rng = np.random.default_rng(request.param)
    return make_curves(rng, layers=3), ("factors", "pivoted")[request.param % 2], int(rng.integers(1, 4))


Problem = tuple[list[LossCurve], str, int]


@pytest.mark.parametrize("allocation", ["uniform", "energy"])
def test_budget_is_met_and_ranks_are_allowed_choices(problem: Problem, allocation: str) -> None:
    curves, storage, multiple = problem
    total = sum(curve.dense_parameters for curve in curves)
    for budget in range(0, total + 10, 3):
        ranks = allocate(curves, budget, allocation=allocation, storage=storage, multiple=multiple)
        assert list(ranks) == [curve.name for curve in curves]
        assert measure(curves, ranks, storage)[0] <= budget
        for curve in curves:
            rank = ranks[curve.name]
            assert rank is None or rank in rank_choices(curve.out_features, curve.in_features, storage, multiple)


def test_energy_finds_every_optimum_on_the_convex_hull(problem: Problem) -> None:
    curves, storage, multiple = problem
    hull = on_hull(every_allocation(curves, storage, multiple))
    assert len(hull) > 3
    for parameters, loss in hull:
        found = measure(curves, allocate_energy(curves, parameters, storage=storage, multiple=multiple), storage)
        assert found[1] == pytest.approx(loss, rel=ROUNDING, abs=ROUNDING)


def test_energy_lies_between_the_optimum_and_the_hull_point_below(problem: Problem) -> None:
    curves, storage, multiple = problem
    points = every_allocation(curves, storage, multiple)
    hull = on_hull(points)
    for budget in range(0, sum(curve.dense_parameters for curve in curves), 5):
        loss = measure(curves, allocate_energy(curves, budget, storage=storage, multiple=multiple), storage)[1]
        assert least_loss(points, budget) <= loss + ROUNDING
        assert loss <= least_loss(hull, budget) + ROUNDING


def test_energy_is_never_worse_than_uniform() -> None:
    rng = np.random.default_rng(0)
    for trial in range(300):
        curves, storage = make_curves(rng, layers=int(rng.integers(1, 6))), ("factors", "pivoted")[trial % 2]
        budget = int(rng.uniform(0, 1.1) * sum(curve.dense_parameters for curve in curves))
        uniform = measure(curves, allocate_uniform(curves, budget, storage=storage, multiple=2), storage)
        energy = measure(curves, allocate_energy(curves, budget, storage=storage, multiple=2), storage)
        assert energy[1] <= uniform[1] + ROUNDING


def test_a_larger_budget_costs_no_more_loss_at_the_scale_of_a_model() -> None:
    curves = make_curves(np.random.default_rng(1), layers=40, low=32, high=128)
    total = sum(curve.dense_parameters for curve in curves)
    losses, spent = [], []
    for kept in (0.1, 0.3, 0.5, 0.7, 0.9):
        parameters, loss = measure(curves, allocate(curves, int(kept * total)), "pivoted")
        losses.append(loss)
        spent.append(parameters / (kept * total))
    assert losses == sorted(losses, reverse=True)
    # One rank step of the largest layer is 8 * (128 + 128) parameters.
    assert min(spent) > 1 - 8 * 256 / (0.1 * total)


def test_energy_buys_the_directions_that_matter() -> None:
    dull = LossCurve("dull", 16, 16, np.full(16, 1e-6))
    sharp = LossCurve("sharp", 16, 16, np.full(16, 1.0))
    assert allocate([dull, sharp], 256, multiple=1) == {"dull": 0, "sharp": None}


def test_non_convex_curve_jumps_over_its_hollow() -> None:
    """A layer whose energy sits in its last factors is worth nothing or everything, never half."""
    energy = np.full(8, 1.0)
    hollow = LossCurve("hollow", 8, 8, energy)
    cheap = LossCurve("cheap", 8, 8, np.array([1.0, 1e-3, 1e-3, 1e-3, 1e-9, 1e-9, 1e-9, 1e-9]))
    ranks = allocate([hollow, cheap], 64 + 16, storage="factors", multiple=1)
    assert ranks == {"hollow": None, "cheap": 1}


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_zero_energies_cost_nothing(storage: str) -> None:
    curves = [LossCurve("dead", 8, 8, np.zeros(8)), LossCurve("live", 8, 8, np.array([1.0] * 2 + [0.0] * 6))]
    assert allocate(curves, 10_000, storage=storage, multiple=1) == {"dead": 0, "live": 2}
    assert allocate(curves[:1], 20, storage=storage, multiple=1) == {"dead": 0}
    assert allocate(curves, 0, storage=storage, multiple=1) == {"dead": 0, "live": 0}


@pytest.mark.parametrize("scale", [1e-40, 1e-12, 1.0, 1e12])
def test_energy_does_not_depend_on_the_unit_of_the_loss(scale: float) -> None:
    curves = make_curves(np.random.default_rng(2), layers=4)
    scaled = [LossCurve(c.name, c.out_features, c.in_features, c.energy * scale) for c in curves]
    budget = sum(curve.dense_parameters for curve in curves) // 2
    assert allocate(scaled, budget, multiple=1) == allocate(curves, budget, multiple=1)


def test_uniform_keeps_the_same_fraction_of_every_layer() -> None:
    curves = [LossCurve(f"{m}x{n}", m, n, np.ones(min(m, n))) for m, n in ((64, 96), (96, 64), (128, 128))]
    total = sum(curve.dense_parameters for curve in curves)
    ranks = allocate(curves, total // 2, allocation="uniform", multiple=1)
    for curve in curves:
        rank = ranks[curve.name]
        assert rank is not None
        kept = rank_parameters(rank, curve.out_features, curve.in_features) / curve.dense_parameters
        assert kept <= 0.5 < rank_parameters(rank + 1, curve.out_features, curve.in_features) / curve.dense_parameters
    assert set(allocate(curves, total, allocation="uniform").values()) == {None}


def test_negative_budget() -> None:
    with pytest.raises(ValueError, match="`budget` must be at least 0, got -1"):
        allocate([LossCurve("layer", 2, 2, np.ones(2))], -1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_energy_that_is_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="energy of `layer` must be finite"):
        allocate([LossCurve("layer", 2, 2, np.array([value, 0.0]))], 2)


def test_seconds_are_a_second_budget(problem: Problem) -> None:
    curves, storage, multiple = problem
    rng = np.random.default_rng(len(curves))
    seconds = {}
    for curve in curves:
        ranks, parameters, _ = curve.choices(storage, multiple)
        # Factors cost a constant more, so that some dense layers are faster than factors of fewer parameters.
        factors = [0.0 if rank == 0 else 10.0 + size for rank, size in zip(ranks, parameters, strict=True)]
        seconds[curve.name] = np.array([*factors[:-1], parameters[-1]]) * rng.uniform(0.5, 2)
    points = []
    choices = [curve.choices(storage, multiple)[0] for curve in curves]
    for picks in itertools.product(*(range(len(own)) for own in choices)):
        ranks = {curve.name: own[pick] for curve, own, pick in zip(curves, choices, picks, strict=True)}
        taken = sum(seconds[curve.name][pick] for curve, pick in zip(curves, picks, strict=True))
        points.append((*measure(curves, ranks, storage), taken))
    total, dense = sum(c.dense_parameters for c in curves), sum(own[-1] for own in seconds.values())
    gaps = []
    for kept, target in itertools.product((0.4, 0.7, 1.0), (0.2, 0.5, 0.8)):
        latency = LatencyBudget(seconds, target)
        ranks = allocate(curves, int(kept * total), storage=storage, multiple=multiple, latency=latency)
        parameters, loss = measure(curves, ranks, storage)
        taken = sum(seconds[c.name][own.index(ranks[c.name])] for c, own in zip(curves, choices, strict=True))
        assert parameters <= kept * total
        assert taken <= target * dense * (1 + ROUNDING)
        best = min(own for size, own, time in points if size <= int(kept * total) and time <= target * dense)
        worst = max(own for _, own, _ in points)
        gaps.append((loss - best) / worst)
        assert gaps[-1] >= -ROUNDING
    # Three layers have few points on their hulls.
    assert np.median(gaps) < 0.05


def test_a_latency_that_no_rank_reaches_is_refused() -> None:
    curve = LossCurve("layer", 4, 4, np.ones(4))
    ranks, _, _ = curve.choices("factors", 1)
    seconds = {"layer": np.linspace(0.5, 1.0, len(ranks))}
    assert allocate([curve], 16, storage="factors", multiple=1, latency=LatencyBudget(seconds, 0.5)) == {"layer": 0}
    with pytest.raises(ValueError, match=r"`latency_target` must be at least 0\.50 here.*got 0\.40"):
        allocate([curve], 16, storage="factors", multiple=1, latency=LatencyBudget(seconds, 0.4))
