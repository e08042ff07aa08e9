"""Generations of the `fast` preset: seeded by the energy allocation, bred in prices, screened by predicted loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.search.candidate import SEARCH, Candidate
from optimum_sieve.search.ranking.across_tasks import Standings
from optimum_sieve.search.ranking.by_task import is_stagnant
from optimum_sieve.search.ranking.predictor import Predictor, group_members, mean_offsets

from .operators import group_mutation, mutation_rates, one_point_crossover, tournament, uniform_crossover


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from optimum_sieve.search.genome import Genome, SearchSpace
    from optimum_sieve.search.presets import SearchPreset
    from optimum_sieve.search.ranking.by_task import Goal


# Kept fractions of the seeds.
ENERGY_SEEDS = (0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28, 0.2, 0.12)
UNIFORM_SEEDS = (0.9, 0.7, 0.5)
# Children have the best size so far, or one up to this share of the way back to the energy allocation's.
_WAY_BACK = 0.5
# Standard deviation of mutations of the logarithmic price: at first, at least and at most; and the factor by which it
# changes where few or many children of a generation were scored to the end.
_STRENGTH, _STRENGTHS, _ADAPTION = 0.3, (0.05, 0.6), 0.7
_FEW, _MANY = 0.3, 0.6
# Groups that change in a child, and lengths of steps against the fitted slopes.
_GROUPS_MUTATED = 6
_LENGTHS = (0.0, 10.0, 20.0, 40.0, 60.0)
# Candidates that are surely worse than the one of this rank are dropped.
_RIVAL_RANK = 3
_LEAST_GAIN = 0.002
# Kept fraction by which a measured candidate departs from the linear model beside its noise.
_SCATTER = 0.01
# Candidates of each generation that are chosen by the mean of the prediction.
_BY_MEAN = 4


def seeds(space: SearchSpace, goal: Goal, allocate: Callable[[str, float], Genome], rng: np.random.Generator,
          size: int) -> list[tuple[Genome, str]]:  # fmt: skip
    """Return the first generation: the energy and uniform allocations at several sizes, or variants of one size."""
    if goal.kept is None:
        found = [(allocate("energy", kept), "energy") for kept in ENERGY_SEEDS]
        return found + [(allocate("uniform", kept), "uniform") for kept in UNIFORM_SEEDS]
    found = [(allocate("energy", goal.kept * factor), "energy") for factor in (1.0, 0.85, 1.0 / 0.85)]
    found.append((allocate("uniform", goal.kept), "uniform"))
    energy = found[0][0]
    prices = space.log_prices(energy)
    while len(found) < size:
        found.append((space.at_prices(group_mutation(prices, space, _STRENGTH, rng), goal.kept), "mutation"))
    return found


def next_generation(
    space: SearchSpace,
    preset: SearchPreset,
    goal: Goal,
    history: Sequence[Candidate],
    allocate: Callable[[str, float], Genome],
    seed: int,
) -> list[Candidate]:
    """Return the candidates of the generation after `history`, or none where the search is over.

    A pure function of its arguments: a search that was stopped goes on as if it had not been.

    Args:
        space (`SearchSpace`): The space.
        preset (`SearchPreset`): The settings.
        goal (`Goal`): What is searched.
        history (`Sequence[Candidate]`): All candidates of the generations before, with outcomes, in order.
        allocate (`Callable`): Maps an allocation and a kept fraction to a genome.
        seed (`int`): Seed of everything random.
    """
    generation = max((candidate.generation for candidate in history), default=-1) + 1
    rng = np.random.default_rng([seed, generation])
    if generation == 0:
        found = seeds(space, goal, allocate, rng, preset.population_size)
        return [
            Candidate(genome=genome, part=SEARCH, generation=0, slot=slot, origin=origin)
            for slot, (genome, origin) in enumerate(found)
        ]
    standing = Standings(space, tuple(history), goal)
    if generation >= preset.generations or not standing.complete:
        return []
    if is_stagnant(standing.best_size_by_generation(), preset.patience, _LEAST_GAIN):
        return []
    return _children(standing, preset, generation, rng)


def _children(standing: Standings, preset: SearchPreset, generation: int, rng: np.random.Generator) -> list[Candidate]:
    """Breed many children and take those that promise the least size.

    Each place goes to the child that is best under coefficients drawn from what is known of them (Thompson sampling),
    which explores while little is known; the last places go by the mean.
    """
    space, members = standing.space, group_members(standing.space)
    predictor = fit_predictor(standing)
    slopes = members @ predictor.mean[:-1]
    rates = mutation_rates(space, preset.mutation_prob, slopes)
    strength = mutation_strength(standing)
    prices = [space.log_prices(candidate.genome) for candidate in standing.ranking[: preset.population_size]]
    pool = _fitted(standing, prices[:4], slopes, rng)
    pool += [
        _child(standing, preset, prices, rates, strength, rng) for _ in range(preset.screening * preset.population_size)
    ]
    features = np.array([_features(standing, genome, members) for genome, _ in pool])
    known = {candidate.genome for candidate in standing.scored}
    chosen: list[tuple[Genome, str]] = []
    for place in range(preset.population_size):
        sampled = place < preset.population_size - _BY_MEAN
        promised = features @ (predictor.sample(rng) if sampled else predictor.mean)
        best = next((int(i) for i in np.argsort(promised, kind="stable") if pool[i][0] not in known), None)
        if best is not None:
            known.add(pool[best][0])
            chosen.append(pool[best])
    rival = standing.ranking[min(_RIVAL_RANK, len(standing.ranking) - 1)]
    return [
        Candidate(
            genome=genome,
            part=SEARCH,
            generation=generation,
            slot=slot,
            origin=origin,
            rival=(rival.generation, rival.slot),
            allowances=standing.allowances(genome, rival),
        )
        for slot, (genome, origin) in enumerate(chosen)
    ]


def _features(standing: Standings, genome: Genome, members: NDArray[np.float64]) -> NDArray[np.float64]:
    """Describe how a genome departs from the energy allocation of its size."""
    return np.append(mean_offsets(standing.space, genome, members), standing.predicted_excess(genome))


def fit_predictor(standing: Standings) -> Predictor:
    """Fit the predictor to the candidates near the limit, but for the uniform ones, which lie far off."""
    members = group_members(standing.space)
    near = [candidate for candidate in standing.near if candidate.origin != "uniform"]
    features = np.array([_features(standing, candidate.genome, members) for candidate in near])
    excesses = [standing.excess(candidate) for candidate in near]
    errors = [standing.noise(candidate) for candidate in near]
    return Predictor.fit(
        features.reshape(len(near), members.shape[1] + 1),
        np.array(excesses),
        np.hypot(errors, _SCATTER),
    )


def _fitted(
    standing: Standings, prices: list[NDArray[np.float64]], slopes: NDArray[np.float64], rng: np.random.Generator
) -> list[tuple[Genome, str]]:
    """Move the energy allocation and the best candidates' prices against the fitted slopes, by several lengths."""
    starts = [np.zeros_like(slopes), np.mean(prices, axis=0), *prices]
    moved = [(start - length * slopes, length) for start in starts for length in _LENGTHS]
    return [
        (standing.space.at_prices(own, _size(standing, rng)), "slope" if length else "mean") for own, length in moved
    ]


def _size(standing: Standings, rng: np.random.Generator) -> float:
    if standing.goal.kept is not None:
        return standing.goal.kept
    best = standing.size(standing.ranking[0])
    size = best + rng.uniform(0.0, _WAY_BACK) * max(0.0, standing.energy_size - best)
    return float(np.clip(size, 0.0, 1.0))


def mutation_strength(standing: Standings) -> float:
    """Return the standard deviation of the next mutations: less where most children were dropped, more where few.

    Reference: Rechenberg (1973), *Evolutionsstrategie*, whose rule adapts the step to the share of successes.
    """
    strength = _STRENGTH
    for generation in range(1, 1 + max(candidate.generation for candidate in standing.scored)):
        children = [c.outcome.complete for c in standing.scored if c.generation == generation and c.outcome]
        share = sum(children) / max(1, len(children))
        strength *= _ADAPTION if share < _FEW else 1 / _ADAPTION if share > _MANY else 1.0
    return float(np.clip(strength, *_STRENGTHS))


def _child(
    standing: Standings,
    preset: SearchPreset,
    population: list[NDArray[np.float64]],
    rates: NDArray[np.float64],
    strength: float,
    rng: np.random.Generator,
) -> tuple[Genome, str]:
    """Breed one child of a population's prices: selection, crossover, mutation of groups and of single matrices."""
    space, places = standing.space, range(len(population))
    parents = [population[tournament(places, preset.tournament_size, rng)] for _ in range(2)]
    prices, origin = parents[0], "mutation"
    if rng.random() < preset.crossover_prob:
        crossover = one_point_crossover if rng.random() < 0.5 else uniform_crossover
        prices, origin = crossover(parents[0], parents[1], rng), "crossover"
    for _ in range(_GROUPS_MUTATED):
        prices = group_mutation(prices, space, strength, rng)
    single = rng.random(len(prices)) < rates
    prices = prices + np.where(single, rng.normal(0.0, strength, len(prices)), 0.0)
    return space.at_prices(prices, _size(standing, rng)), origin
