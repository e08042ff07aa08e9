"""The `fast` preset: seeded by the energy allocation, bred in prices, screened by predicted loss. Without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.search.ranking import Ranking

from .operators import crossover, group_mutation, tournament


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from optimum_sieve.search.candidate import Candidate
    from optimum_sieve.search.genome import Genome, SearchSpace
    from optimum_sieve.search.loop import Search
    from optimum_sieve.search.ranking import Goal


# Kept fractions of the seeds; for a given size, factors on it.
_SEEDS, _FACTORS = (0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28, 0.2, 0.12), (1.0, 0.85, 1.0 / 0.85)
# Size of children, as a fraction of the way from the best size so far back to the limit of the energy allocation.
_WAY_BACK = 0.25
_CROSSOVER_PROB, _MUTATION_PROB, _TOURNAMENT_SIZE = 0.5, 0.1, 3
# Standard deviation of mutations of the logarithmic price, and number of groups that mutate in a child.
_STRENGTH, _GROUPS = 0.3, 6
# Children bred for each one that is scored, and best candidates that are screened with them at the new size.
_SCREENING, _ELITES = 16, 4


def best(space: SearchSpace, scored: Sequence[Candidate], goal: Goal) -> tuple[Candidate, float]:
    """Return the best candidate and the size at which its allocation would reach the limit."""
    ranking = Ranking(space, scored, goal)
    return ranking.best_first[0], ranking.size(ranking.best_first[0])


def breed(
    search: Search, space: SearchSpace, history: Sequence[Candidate], rng: np.random.Generator
) -> list[tuple[Genome, str]]:
    """Return the genomes of the generation after `history` with their origins, or none at the end of the search."""
    preset, kept = search.preset, search.goal.kept
    if not history:
        return _seeds(space, kept, preset.population_size, rng)
    ranking = Ranking(space, history, search.goal)
    if not ranking.best_first or ranking.has_stalled(preset.patience):
        return []
    parents = [space.log_prices(candidate.genome) for candidate in ranking.best_first[: preset.population_size]]
    elites = parents[:_ELITES]
    pool = [(prices, "elite") for prices in (np.zeros(len(space.genes)), np.mean(elites, axis=0), *elites)]
    pool += [_child(space, parents, rng) for _ in range(_SCREENING * preset.population_size)]
    if kept is None:
        smallest = ranking.size(ranking.best_first[0])
        kept = float(np.clip(smallest + _WAY_BACK * max(0.0, ranking.limit - smallest), 0.0, 1.0))
    known = {candidate.genome for candidate in history}
    children = {space.at_prices(prices, kept): origin for prices, origin in reversed(pool)}
    unknown = [child for child in children.items() if child[0] not in known]
    return sorted(unknown, key=lambda child: space.losses(child[0]).sum())[: preset.population_size]


def _seeds(
    space: SearchSpace, kept: float | None, population_size: int, rng: np.random.Generator
) -> list[tuple[Genome, str]]:
    """Return energy allocations of several sizes; for a given size, also variants of it."""
    sizes = _SEEDS if kept is None else [kept * factor for factor in _FACTORS]
    seeds = dict.fromkeys((space.energy(size) for size in sizes), "energy")
    for _ in range(population_size - len(seeds) if kept else 0):
        prices = group_mutation(np.zeros(len(space.genes)), space, _STRENGTH, rng)
        seeds.setdefault(space.at_prices(prices, kept or 0.0), "mutation")
    return list(seeds.items())


def _child(
    space: SearchSpace, parents: Sequence[NDArray[np.float64]], rng: np.random.Generator
) -> tuple[NDArray[np.float64], str]:
    """Breed the prices of one child by selection, crossover, and mutation of groups and of single matrices."""
    indices = range(len(parents))
    first, second = (parents[tournament(indices, _TOURNAMENT_SIZE, rng)] for _ in range(2))
    crossed = rng.random() < _CROSSOVER_PROB
    prices = crossover(first, second, rng) if crossed else first
    for _ in range(_GROUPS):
        prices = group_mutation(prices, space, _STRENGTH, rng)
    mutated = rng.random(len(prices)) < _MUTATION_PROB
    return prices + mutated * rng.normal(0.0, _STRENGTH, len(prices)), "crossover" if crossed else "mutation"
