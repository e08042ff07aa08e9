r"""The predicted losses, corrected where the search is by one backward pass. Does not import torch.

The moments predict each matrix's loss on its own, from the dense model or one pruned half way. At the size where a
search ends, the other matrices are pruned too, and what a direction of one matrix is worth has changed: more for some
matrices, less for others.

Let gates \(g_j\) multiply the directions of all matrices, 1 where kept and 0 where dropped. If the loss is quadratic
with its minimum at the dense model, \(L(g) = L(1) + \tfrac12 (1 - g)^\top H (1 - g)\), its gradient is
\(\partial L / \partial g = -H (1 - g)\), so \(-\tfrac12 \sum \partial L / \partial g_j\) over the dropped directions
is the whole rise of the loss, with every interaction, and a matrix's part of the sum is its share. One backward pass
gives all shares. What steers a search is the share of those directions of a matrix that would come back first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from optimum_sieve.search.genome import Gene, Genome, SearchSpace
    from optimum_sieve.search.scoring.scorer import JointScorer


# Directions whose share is taken: this part of a matrix's largest rank, and at least so many, against their noise.
_PART, _LEAST = 1 / 6, 16
# How far a ratio is drawn to the mean one: as if so many average matrices more had shown that.
_PRIOR = 1.0


@dataclass(frozen=True, eq=False)
class Shares:
    """Shares of the loss measured at one genome.

    Args:
        genome (`tuple[int, ...]`): Where they were measured.
        values (`tuple[float, ...]`): Share of each matrix's window, in nats; 0 where it is dense.
    """

    genome: Genome
    values: tuple[float, ...]


def windows(space: SearchSpace, genome: Genome) -> dict[str, tuple[int, int | None]]:
    """Return the directions of each pruned matrix that would come back first: from its rank to a higher one or all."""
    levels = list(zip(space.genes, genome, strict=True))
    return {
        gene.name: (rank, gene.ranks[_upper(gene, level)])
        for gene, level in levels
        if (rank := gene.ranks[level]) is not None
    }


def measure_shares(space: SearchSpace, scorer: JointScorer, genome: Genome) -> Shares:
    """Measure the loss's shares at a genome."""
    wanted = windows(space, genome)
    # A dense model has no dropped directions.
    found = scorer.shares(space.ranks(genome), wanted) if wanted else {}
    return Shares(genome, tuple(found.get(gene.name, 0.0) for gene in space.genes))


def corrected(space: SearchSpace, measured: Sequence[Shares]) -> SearchSpace:
    """Return the space with every matrix's losses multiplied by what was measured of them over what they predicted."""
    if not measured:
        return space
    factors = np.mean([_log_factors(space, shares) for shares in measured], axis=0)
    return space.rescaled(np.exp(factors))


def _log_factors(space: SearchSpace, shares: Shares) -> NDArray[np.float64]:
    levels = zip(space.genes, shares.genome, strict=True)
    predicted = np.array([float(gene.losses[level] - gene.losses[_upper(gene, level)]) for gene, level in levels])
    values = np.maximum(shares.values, 0.0)
    mean = predicted.mean()
    if not (predicted.sum() > 0 and values.sum() > 0):
        return np.zeros(len(predicted))
    scale = values.sum() / predicted.sum()
    factors: NDArray[np.float64] = np.log((values / scale + _PRIOR * mean) / (predicted + _PRIOR * mean))
    return factors


def _upper(gene: Gene, level: int) -> int:
    """Return the first level whose rank lies a window above that of `level`; dense is above all."""
    rank = gene.ranks[level]
    if rank is None:
        return level
    least = rank + max(_LEAST, int(_PART * max(own for own in gene.ranks if own is not None)))
    return next(place for place in range(level, gene.num_levels) if (own := gene.ranks[place]) is None or own >= least)
