"""The `fast` preset: seeded by the energy allocation, bred in prices, screened by predicted loss. Without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.search.ranking import Ranking

from .operators import crossover, group_mutation, mutation_rates, tournament


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from optimum_sieve.search.candidate import Candidate
    from optimum_sieve.search.genome import Genome, SearchSpace
    from optimum_sieve.search.loop import Search
    from optimum_sieve.search.ranking import Goal


# Kept fractions of the seeds.
ENERGY_SEEDS = (0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28, 0.2, 0.12)
UNIFORM_SEEDS = (0.9, 0.7, 0.5)
# Children have the best size so far, or a size up to this fraction of the way back to the energy allocation's.
_WAY_BACK = 0.5
_CROSSOVER_PROB, _MUTATION_PROB, _TOURNAMENT_SIZE = 0.5, 0.1, 3
# Standard deviation of mutations of the logarithmic price, and number of groups that mutate in a child.
_STRENGTH, _GROUPS = 0.3, 6
# Children bred for each one that is scored.
_SCREENING = 16
# Best candidates that are screened again, at their new size and with the new correction.
_ELITES = 4


def best(space: SearchSpace, scored: Sequence[Candidate], goal: Goal) -> tuple[Candidate, float]:
    """Return the best candidate and the size at which its allocation would reach the limit."""
    ranking = Ranking(space, scored, goal)
    return ranking.best_first[0], ranking.size(ranking.best_first[0])


def breed(
    search: Search, space: SearchSpace, history: Sequence[Candidate], rng: np.random.Generator
) -> list[tuple[Genome, str]]:
    """Return the genomes of the generation after `history` with their origins, or none at the end of the search."""
    if not history:
        return _seeds(search, space, rng)
    preset, ranking = search.preset, Ranking(space, history, search.goal)
    if not ranking.best_first or ranking.has_stalled(preset.patience):
        return []
    parents = [space.log_prices(candidate.genome) for candidate in ranking.best_first[: preset.population_size]]
    elites = parents[:_ELITES]
    pool = [(prices, "elite") for prices in (np.zeros(len(space.genes)), np.mean(elites, axis=0), *elites)]
    rates = mutation_rates(space, _MUTATION_PROB)
    pool += [_child(space, parents, rates, rng) for _ in range(_SCREENING * preset.population_size)]
    children = [(space.at_prices(prices, _size(ranking, rng)), origin) for prices, origin in pool]
    known = {candidate.genome for candidate in history}
    unknown = {genome: origin for genome, origin in reversed(children) if genome not in known}
    return sorted(unknown.items(), key=lambda child: ranking.predicted_size(child[0]))[: preset.population_size]


def _seeds(search: Search, space: SearchSpace, rng: np.random.Generator) -> list[tuple[Genome, str]]:
    """Return the energy and uniform allocations at several sizes, or variants of one size."""
    kept, allocate = search.goal.kept, search.allocate
    if kept is None:
        seeds = [(allocate("energy", size), "energy") for size in ENERGY_SEEDS]
        return seeds + [(allocate("uniform", size), "uniform") for size in UNIFORM_SEEDS]
    seeds = [(allocate("energy", kept * factor), "energy") for factor in (1.0, 0.85, 1.0 / 0.85)]
    seeds.append((allocate("uniform", kept), "uniform"))
    prices = space.log_prices(seeds[0][0])
    while len(seeds) < search.preset.population_size:
        seeds.append((space.at_prices(group_mutation(prices, space, _STRENGTH, rng), kept), "mutation"))
    return seeds


def _size(ranking: Ranking, rng: np.random.Generator) -> float:
    """Draw the size of a child."""
    if ranking.goal.kept is not None:
        return ranking.goal.kept
    best = ranking.size(ranking.best_first[0])
    return float(np.clip(best + rng.uniform(0.0, _WAY_BACK) * max(0.0, ranking.limit - best), 0.0, 1.0))


def _child(
    space: SearchSpace, parents: Sequence[NDArray[np.float64]], rates: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float64], str]:
    """Breed the prices of one child by selection, crossover, and mutation of groups and of single matrices."""
    indices = range(len(parents))
    first, second = (parents[tournament(indices, _TOURNAMENT_SIZE, rng)] for _ in range(2))
    crossed = rng.random() < _CROSSOVER_PROB
    prices = crossover(first, second, rng) if crossed else first
    for _ in range(_GROUPS):
        prices = group_mutation(prices, space, _STRENGTH, rng)
    mutated = rng.random(len(prices)) < rates
    return prices + mutated * rng.normal(0.0, _STRENGTH, len(prices)), "crossover" if crossed else "mutation"
