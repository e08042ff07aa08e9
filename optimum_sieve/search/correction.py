r"""Correct the predicted losses where the search works, by one backward pass. Does not import torch.

The moments predict the loss of each matrix alone, with the others dense. Where a search works, the other matrices are
pruned too, which changes the value of a direction: more for some matrices, less for others.

Let gates \(g_j\) multiply the directions of all matrices, 1 for kept and 0 for dropped ones. For a quadratic loss with
its minimum at the dense model, \(L(g) = L(1) + \tfrac12 (1 - g)^\top H (1 - g)\), the gradient is
\(\partial L / \partial g = -H (1 - g)\). So \(-\tfrac12 \sum \partial L / \partial g_j\) over the dropped directions
is the whole rise of the loss, with every interaction, and a matrix's part of the sum is its share. One backward pass
gives all shares. The correction uses the share of the directions that a matrix would get back first, its window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .genome import SearchSpace


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .genome import Gene, Genome
    from .scoring.scorer import JointScorer


# Directions in a window, against noise: this fraction of the matrix's largest rank, and at least this many.
_WINDOW, _LEAST = 1 / 6, 16
# Shrinks each matrix's factor toward the mean factor: the weight of the mean, in average matrices.
_PRIOR = 1.0


@dataclass(frozen=True, eq=False)
class Shares:
    """Share of the loss of each matrix's window at a genome, in nats; 0 for a dense matrix."""

    genome: Genome
    values: tuple[float, ...]


def windows(space: SearchSpace, genome: Genome) -> dict[str, tuple[int, int | None]]:
    """Return the window of each pruned matrix: its rank, and the next higher rank or `None` for all directions."""
    return {
        gene.name: (rank, gene.ranks[_upper(gene, level)])
        for gene, level in zip(space.genes, genome, strict=True)
        if (rank := gene.ranks[level]) is not None
    }


def measure_shares(space: SearchSpace, scorer: JointScorer, genome: Genome) -> Shares:
    """Measure the shares of the loss at a genome."""
    wanted = windows(space, genome)
    measured = scorer.shares(space.ranks(genome), wanted) if wanted else {}
    return Shares(genome, tuple(measured.get(gene.name, 0.0) for gene in space.genes))


def corrected(space: SearchSpace, measured: Sequence[Shares]) -> SearchSpace:
    """Return the space with the losses of each matrix multiplied by its ratio of measured to predicted loss."""
    if not measured:
        return space
    factors = np.exp(np.mean([_log_factors(space, shares) for shares in measured], axis=0))
    pairs = zip(space.genes, factors, strict=True)
    return SearchSpace(tuple(replace(gene, losses=gene.losses * float(factor)) for gene, factor in pairs))


def _log_factors(space: SearchSpace, shares: Shares) -> NDArray[np.float64]:
    levels = zip(space.genes, shares.genome, strict=True)
    predicted = np.array([float(gene.losses[level] - gene.losses[_upper(gene, level)]) for gene, level in levels])
    values = np.maximum(shares.values, 0.0)
    if not (predicted.sum() > 0 and values.sum() > 0):
        return np.zeros(len(predicted))
    scaled, prior = values * (predicted.sum() / values.sum()), _PRIOR * predicted.mean()
    factors: NDArray[np.float64] = np.log((scaled + prior) / (predicted + prior))
    return factors


def _upper(gene: Gene, level: int) -> int:
    """Return the first level with a whole window of directions more, or the dense one."""
    rank = gene.ranks[level]
    if rank is None:
        return level
    least = rank + max(_LEAST, int(_WINDOW * max(other or 0 for other in gene.ranks)))
    return next(index for index, other in enumerate(gene.ranks) if other is None or other >= least)
