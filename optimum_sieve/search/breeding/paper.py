"""The `paper` preset: LLM-Sieve's genetic algorithm as described, for comparison. Does not import torch.

Random and uniform seeds; parents by tournament; crossover; one-step mutation; every child scored on all examples; the
best candidate survives. Reference: arXiv 2505.18350.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .operators import crossover, step_mutation, tournament


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.search.candidate import Candidate
    from optimum_sieve.search.genome import Genome, SearchSpace
    from optimum_sieve.search.loop import Search
    from optimum_sieve.search.ranking import Goal


_CROSSOVER_PROB, _MUTATION_PROB, _TOURNAMENT_SIZE = 0.5, 0.2, 5
# Attempts to make a child that was not scored before.
_ATTEMPTS = 20


def best(space: SearchSpace, scored: Sequence[Candidate], goal: Goal) -> tuple[Candidate, float]:
    """Return the best candidate and its size."""
    first = best_first(space, scored, goal)[0]
    return first, space.kept(first.genome)


def best_first(space: SearchSpace, scored: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """Order scored candidates: feasible before infeasible; then by size, or by violation.

    If the goal is a size, that is the constraint, and the score decides. Reference: Deb (2000), *An efficient
    constraint handling method for genetic algorithms*.
    """

    def key(candidate: Candidate) -> tuple[bool, float, float]:
        assert candidate.outcome is not None
        kept, loss = space.kept(candidate.genome), -candidate.outcome.mean
        violation, value = (loss - goal.tolerance, kept) if goal.kept is None else (kept - goal.kept, loss)
        return violation > 0, violation if violation > 0 else value, candidate.outcome.rise

    return sorted(scored, key=key)


def breed(
    search: Search, space: SearchSpace, history: Sequence[Candidate], rng: np.random.Generator
) -> list[tuple[Genome, str]]:
    """Return the genomes of the generation after `history` with their origins, or none at the end of the search."""
    preset = search.preset
    if not history:
        return _seeds(space, search, rng)
    ranking, last = best_first(space, history, search.goal), max(candidate.generation for candidate in history)
    if last - ranking[0].generation >= preset.patience:
        return []
    # The best candidates of all generations: elites survive without another score.
    population = [np.array(candidate.genome) for candidate in ranking[: preset.population_size]]
    known = {candidate.genome for candidate in ranking}
    children: list[tuple[Genome, str]] = []
    for _ in range(preset.population_size):
        bred = (_child(space, population, rng) for _ in range(_ATTEMPTS))
        child, origin = next(((child, origin) for child, origin in bred if child not in known), (None, ""))
        if child is not None:
            known.add(child)
            children.append((child, origin))
    return children


def _seeds(space: SearchSpace, search: Search, rng: np.random.Generator) -> list[tuple[Genome, str]]:
    """Return every level for all matrices at once, those within a given size first, then random levels."""
    depth = max(len(gene.ranks) for gene in space.genes)
    equal = [tuple(min(level, len(gene.ranks) - 1) for gene in space.genes) for level in reversed(range(depth))]
    equal.sort(key=lambda genome: space.kept(genome) > (search.goal.kept or 1.0))
    count = search.preset.population_size
    seeds = [(genome, "uniform") for genome in dict.fromkeys(equal)][:count]
    while len(seeds) < count:
        seeds.append((tuple(int(rng.integers(len(gene.ranks))) for gene in space.genes), "random"))
    return seeds


def _child(space: SearchSpace, population: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[Genome, str]:
    indices = range(len(population))
    first, second = (population[tournament(indices, _TOURNAMENT_SIZE, rng)] for _ in range(2))
    crossed = rng.random() < _CROSSOVER_PROB
    parent = crossover(first, second, rng) if crossed else first
    child = step_mutation(parent, [len(gene.ranks) for gene in space.genes], _MUTATION_PROB, rng)
    return child, "crossover" if crossed else "mutation"
