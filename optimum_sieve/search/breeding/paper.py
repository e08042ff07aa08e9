"""Generations of the `paper` preset: LLM-Sieve's genetic algorithm as described, to compare with.

Random and uniform seeds; parents by tournament; one-point crossover; one-step mutation; every child scored on all
examples; the best candidate survives. Reference: arXiv 2505.18350.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.search.candidate import SEARCH, Candidate

from .operators import (
    constrained_order,
    mutation_rates,
    one_point_crossover,
    step_mutation,
    tournament,
    uniform_crossover,
)


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.search.genome import Genome, SearchSpace
    from optimum_sieve.search.presets import SearchPreset
    from optimum_sieve.search.ranking.by_task import Goal


# Tries at making a child that was not scored before.
_TRIES = 20


def rank(space: SearchSpace, goal: Goal, scored: Sequence[Candidate]) -> list[Candidate]:
    """Order scored candidates, best first: within the tolerance before below it, by size; then by violation.

    With a size to reach in place of a tolerance: that size is the constraint, and the score decides.
    """
    outcomes = [candidate.outcome for candidate in scored if candidate.outcome]
    sizes = [float(space.parameters(candidate.genome)) for candidate in scored]
    if goal.kept is None:
        order = constrained_order(sizes, [-goal.tolerance - o.mean for o in outcomes], [o.rise for o in outcomes])
    else:
        excess = [size / space.num_parameters - goal.kept for size in sizes]
        order = constrained_order([-outcome.mean for outcome in outcomes], excess, [o.rise for o in outcomes])
    return [scored[place] for place in order]


def next_generation(
    space: SearchSpace, preset: SearchPreset, goal: Goal, history: Sequence[Candidate], seed: int
) -> list[Candidate]:
    """Return the candidates of the generation after `history`, or none where the search is over; a pure function."""
    generation = max((candidate.generation for candidate in history), default=-1) + 1
    rng = np.random.default_rng([seed, generation])
    if generation == 0:
        found = _seeds(space, preset, goal, rng)
    elif generation >= preset.generations or _has_stalled(space, goal, history, preset.patience):
        return []
    else:
        found = _children(space, preset, rank(space, goal, history), rng)
    return [
        Candidate(genome=genome, part=SEARCH, generation=generation, slot=slot, origin=origin)
        for slot, (genome, origin) in enumerate(found)
    ]


def _seeds(space: SearchSpace, preset: SearchPreset, goal: Goal, rng: np.random.Generator) -> list[tuple[Genome, str]]:
    """Every level for all matrices at once (where a size is given, those within it first), then random levels."""
    depth = max(gene.num_levels for gene in space.genes)
    equal = [tuple(min(level, gene.num_levels - 1) for gene in space.genes) for level in reversed(range(depth))]
    most = 1.0 if goal.kept is None else goal.kept
    equal.sort(key=lambda genome: space.kept(genome) > most)
    found = [(genome, "uniform") for genome in dict.fromkeys(equal)][: preset.population_size]
    while len(found) < preset.population_size:
        found.append((tuple(int(rng.integers(gene.num_levels)) for gene in space.genes), "random"))
    return found


def _children(
    space: SearchSpace, preset: SearchPreset, ranking: list[Candidate], rng: np.random.Generator
) -> list[tuple[Genome, str]]:
    """Breed a generation from the best candidates ever scored, which keeps the elite without scoring it again."""
    population = ranking[: preset.population_size]
    known = {candidate.genome for candidate in ranking}
    rates = mutation_rates(space, preset.mutation_prob)
    num_levels = [gene.num_levels for gene in space.genes]
    found: list[tuple[Genome, str]] = []
    for _ in range(preset.population_size):
        for _ in range(_TRIES):
            places = range(len(population))
            first, second = (
                np.array(population[tournament(places, preset.tournament_size, rng)].genome) for _ in range(2)
            )
            crossed = rng.random() < preset.crossover_prob
            crossover = one_point_crossover if rng.random() < 0.5 else uniform_crossover
            child = step_mutation(crossover(first, second, rng) if crossed else first, num_levels, rates, rng)
            if child not in known:
                known.add(child)
                found.append((child, "crossover" if crossed else "mutation"))
                break
    return found


def _has_stalled(space: SearchSpace, goal: Goal, history: Sequence[Candidate], patience: int) -> bool:
    """Whether the best candidate is `patience` generations old."""
    last = max(candidate.generation for candidate in history)
    return last - rank(space, goal, history)[0].generation >= patience
