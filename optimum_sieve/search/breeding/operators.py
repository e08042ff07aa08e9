r"""Genetic operators, each a pure function of genomes and an explicit rng. Does not import torch.

Reference: Goldberg and Deb (1991), *A comparative analysis of selection schemes used in genetic algorithms*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from optimum_sieve.search.genome import Genome, SearchSpace

    Rng = np.random.Generator


def tournament(ranking: Sequence[int], size: int, rng: Rng) -> int:
    """Return the best of `size` members drawn at random from `ranking`, which lists them best first."""
    return ranking[int(rng.integers(len(ranking), size=size).min())]


def crossover(first: NDArray[Any], second: NDArray[Any], rng: Rng) -> NDArray[Any]:
    """Combine two parents by one-point or uniform crossover, with equal probability."""
    return (one_point_crossover if rng.random() < 0.5 else uniform_crossover)(first, second, rng)


def one_point_crossover(first: NDArray[Any], second: NDArray[Any], rng: Rng) -> NDArray[Any]:
    """Take the matrices before a random point from `first`, the others from `second`."""
    point = int(rng.integers(1, len(first))) if len(first) > 1 else 0
    return np.concatenate([first[:point], second[point:]])


def uniform_crossover(first: NDArray[Any], second: NDArray[Any], rng: Rng) -> NDArray[Any]:
    """Take every matrix from either parent with equal probability."""
    return np.where(rng.random(len(first)) < 0.5, first, second)


def step_mutation(genome: NDArray[Any], num_levels: Sequence[int], prob: float, rng: Rng) -> Genome:
    """Move each matrix one level up or down with probability `prob`; a level at an end stays there."""
    moves = np.where(rng.random(len(genome)) < prob, rng.choice((-1, 1), size=len(genome)), 0)
    return tuple(int(level) for level in np.clip(genome + moves, 0, np.array(num_levels) - 1))


def group_mutation(
    log_prices: NDArray[np.float64], space: SearchSpace, strength: float, rng: Rng
) -> NDArray[np.float64]:
    """Change the price of one group of matrices, all of one kind or of some neighbouring layers, by a normal number."""
    kinds = sorted(set(space.kinds))
    if len(kinds) > 1 and rng.random() < 0.5:
        kind = kinds[int(rng.integers(len(kinds)))]
        group = np.array([other == kind for other in space.kinds])
    else:
        center, width = rng.random(), rng.uniform(0.05, 0.25)
        group = np.abs(space.depths - center) <= width
    return np.where(group, log_prices + rng.normal(0.0, strength), log_prices)
