r"""The operators of the genetic search, each a pure function of genomes and an explicit rng. Does not import torch.

References: Goldberg and Deb (1991), *A comparative analysis of selection schemes used in genetic algorithms*; Deb
(2000), *An efficient constraint handling method for genetic algorithms*, for the order of candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from optimum_sieve.search.genome import Genome, SearchSpace

    Rng = np.random.Generator


def constrained_order(parameters: Sequence[float], violations: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Order candidates, best first: feasible before infeasible; then fewest parameters, or least violation.

    Args:
        parameters (`Sequence[float]`): Parameters kept.
        violations (`Sequence[float]`): How far the constraint is missed; 0 or less where it is met.
        losses (`Sequence[float]`): What breaks ties, lower is better.

    Example:

    ```python
    >>> constrained_order(parameters=[5, 3, 1, 2], violations=[0, 0, 0.2, 0.1], losses=[0, 0, 0, 0])
    [1, 0, 3, 2]

    ```
    """

    def key(index: int) -> tuple[bool, float, float, int]:
        violation = max(0.0, violations[index])
        return violation > 0, violation if violation > 0 else parameters[index], losses[index], index

    return sorted(range(len(parameters)), key=key)


def tournament(ranking: Sequence[int], size: int, rng: Rng) -> int:
    """Return the best of `size` members drawn at random from `ranking`, which lists them best first."""
    return ranking[int(rng.integers(len(ranking), size=size).min())]


def one_point_crossover(first: NDArray[Any], second: NDArray[Any], rng: Rng) -> NDArray[Any]:
    """Take the matrices of the layers before a random point from `first`, the others from `second`."""
    point = int(rng.integers(1, len(first))) if len(first) > 1 else 0
    return np.concatenate([first[:point], second[point:]])


def uniform_crossover(first: NDArray[Any], second: NDArray[Any], rng: Rng) -> NDArray[Any]:
    """Take every matrix from either parent with equal probability."""
    return np.where(rng.random(len(first)) < 0.5, first, second)


def step_mutation(
    genome: Sequence[int] | NDArray[Any], num_levels: Sequence[int], rates: NDArray[np.float64], rng: Rng
) -> Genome:
    """Move each matrix one level up or down with its own probability; a level past an end stays where it is."""
    moves = np.where(rng.random(len(genome)) < rates, rng.choice((-1, 1), size=len(genome)), 0)
    return tuple(
        int(min(max(level + move, 0), count - 1)) for level, move, count in zip(genome, moves, num_levels, strict=True)
    )


def mutation_rates(
    space: SearchSpace, mutation_prob: float, slopes: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Return a mutation probability for every matrix, `mutation_prob` on average.

    By kind: in proportion to the square root of the parameters one of its steps moves, as large steps have most to
    win. By kind and depth, where `slopes` are given: the more, the farther measurements departed from the prediction.

    Args:
        space (`SearchSpace`): The space.
        mutation_prob (`float`): Mean probability.
        slopes (`numpy.ndarray` of shape `(matrices,)`, *optional*): Of the predictor, for each matrix.
    """
    steps = np.array([float(np.diff(gene.parameters).mean()) if gene.num_levels > 1 else 0.0 for gene in space.genes])
    shares = np.sqrt(steps) * (1.0 if slopes is None else 1 + np.abs(slopes) / max(float(np.abs(slopes).mean()), 1e-12))
    if not shares.sum():
        return np.zeros(len(space.genes))
    rates: NDArray[np.float64] = np.clip(mutation_prob * shares / shares.mean(), 0.0, 1.0)
    return rates


def group_mutation(
    log_prices: NDArray[np.float64], space: SearchSpace, strength: float, rng: Rng
) -> NDArray[np.float64]:
    """Make one group of matrices dearer or cheaper: all of one kind, or all of some neighbouring layers.

    Args:
        log_prices (`numpy.ndarray` of shape `(matrices,)`): From [`SearchSpace.log_prices`].
        space (`SearchSpace`): The space.
        strength (`float`): Standard deviation of the change of the logarithmic price.
        rng (`numpy.random.Generator`): Source of randomness.
    """
    kinds = sorted(set(space.kinds))
    if len(kinds) > 1 and rng.random() < 0.5:
        kind = kinds[int(rng.integers(len(kinds)))]
        group = np.array([own == kind for own in space.kinds])
    else:
        center, width = rng.random(), rng.uniform(0.05, 0.25)
        group = np.abs(space.depths - center) <= width
    return np.where(group, log_prices + rng.normal(0.0, strength), log_prices)
