r"""The search space: a level for every matrix, and the cost of a pattern of levels. Does not import torch.

A *level* is one of a matrix's ranks, in ascending order of parameters; the last one is dense. A *genome* is a level for
every matrix, in the model's order.

A second coordinate describes a genome by prices: at a *price* (loss per parameter saved), the best level of a matrix
minimizes loss + price * parameters. With one price for all matrices, the genome is the energy allocation; the logarithm
of each matrix's price relative to the common price says how it departs from that, on one scale for all matrices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.allocation.budget import Ranks, largest_rank


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from optimum_sieve.allocation.allocators import LossCurve


Genome = tuple[int, ...]

# A price that stands for 0.
_NO_PRICE = 1e-300
# Prices differ by less than the exponential of this.
_LARGEST_RATIO = 60.0
# Distance of a departing matrix's price from the ends of its range, so that rounding does not move it out again.
_INSET = 0.05

_LAYER_NAME = re.compile(r"(.*?\b\d+)\.(.+)")


def split_name(name: str) -> tuple[str, str]:
    """Split a module name into its layer and the kind of matrix; the first number ends the layer's name.

    Example:

    ```python
    >>> split_name("model.layers.3.mlp.up_proj")
    ('model.layers.3', 'mlp.up_proj')

    ```
    """
    numbered = _LAYER_NAME.fullmatch(name)
    return (numbered[1], numbered[2]) if numbered else ("", name)


@dataclass(frozen=True, eq=False)
class Gene:
    """One matrix and its levels.

    Args:
        name (`str`): Module name.
        ranks (`tuple[int | None, ...]`): Its ranks, ascending; the last is `None`, dense.
        parameters (`numpy.ndarray` of shape `(levels,)`): Parameters at each level, ascending.
        losses (`numpy.ndarray` of shape `(levels,)`): Predicted loss at each level.
    """

    name: str
    ranks: tuple[int | None, ...]
    parameters: NDArray[np.float64]
    losses: NDArray[np.float64]

    def price_range(self, level: int) -> tuple[float, float]:
        """Return the lowest and the highest logarithmic price at which a level is the best one.

        If there is no such price, return twice the one at which it is nearest to the best.
        """
        losses, parameters = self.losses - self.losses[level], self.parameters - self.parameters[level]
        below, above = losses[:level] / -parameters[:level], -losses[level + 1 :] / parameters[level + 1 :]
        low = float(np.log(above.max())) if above.max(initial=0.0) > _NO_PRICE else -np.inf
        high = float(np.log(max(below.min(), _NO_PRICE))) if below.size else np.inf
        return (low, high) if low <= high else ((low + high) / 2, (low + high) / 2)


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """All genomes.

    Args:
        genes (`tuple[Gene, ...]`): The matrices, in the model's order.
    """

    genes: tuple[Gene, ...]

    @classmethod
    def from_curves(
        cls, curves: Sequence[LossCurve], *, storage: str, multiple: int, levels: Sequence[float] | None = None
    ) -> SearchSpace:
        """Make the space of all allowed ranks or, with `levels`, of the ranks next below these kept fractions."""
        genes = []
        for curve in curves:
            ranks, parameters, losses = curve.choices(storage, multiple)
            chosen = list(range(len(ranks)))
            if levels is not None:
                shape = (curve.out_features, curve.in_features)
                budgets = [int(level * curve.dense_parameters) for level in levels if level < 1]
                allowed = {None, *(largest_rank(budget, *shape, storage, multiple) for budget in budgets)}
                chosen = [index for index, rank in enumerate(ranks) if rank in allowed]
            genes.append(Gene(curve.name, tuple(ranks[i] for i in chosen), parameters[chosen], losses[chosen]))
        return cls(tuple(genes))

    @cached_property
    def num_parameters(self) -> float:
        """Parameters of all matrices when dense."""
        return float(sum(gene.parameters[-1] for gene in self.genes))

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each matrix."""
        return tuple(split_name(gene.name)[1] for gene in self.genes)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Layer of each matrix."""
        return tuple(split_name(gene.name)[0] for gene in self.genes)

    @cached_property
    def depths(self) -> NDArray[np.float64]:
        """Relative depth of each matrix's layer, from 0 (first) to 1 (last)."""
        order = {layer: index for index, layer in enumerate(dict.fromkeys(self.layers))}
        return np.array([order[layer] for layer in self.layers]) / max(1, len(order) - 1)

    def ranks(self, genome: Genome) -> Ranks:
        """Return the rank of every matrix, `None` for a dense one."""
        return {gene.name: gene.ranks[level] for gene, level in zip(self.genes, genome, strict=True)}

    def parameters(self, genome: Genome) -> int:
        """Return the number of parameters kept."""
        return int(sum(gene.parameters[level] for gene, level in zip(self.genes, genome, strict=True)))

    def kept(self, genome: Genome) -> float:
        """Return the fraction of the parameters kept."""
        return self.parameters(genome) / self.num_parameters

    def losses(self, genome: Genome) -> NDArray[np.float64]:
        """Return the predicted loss of every matrix."""
        return np.array([gene.losses[level] for gene, level in zip(self.genes, genome, strict=True)])

    def log_prices(self, genome: Genome) -> NDArray[np.float64]:
        """Return every matrix's logarithmic price minus the common one: about 0 for an energy allocation.

        A level is the best one for a range of prices, which is wide for rank 0 and dense. A matrix departs only if the
        common price lies outside its range.
        """
        low, high = np.array([gene.price_range(level) for gene, level in zip(self.genes, genome, strict=True)]).T
        inner = np.isfinite(low) & np.isfinite(high)
        common = float(np.median((low[inner] + high[inner]) / 2)) if inner.any() else 0.0
        if low.max() < high.min():
            common = float(np.clip(common, low.max(), high.min()))
        inset = np.where(inner, np.minimum((high - low) / 2, _INSET), _INSET)
        prices: NDArray[np.float64] = np.clip(common, low + inset, high - inset) - common
        return prices

    def at_prices(self, log_prices: NDArray[np.float64], kept: float) -> Genome:
        """Return the genome with these relative prices at the lowest common price that keeps at most `kept`."""
        parameters, losses = self._table
        budget, rows = kept * self.num_parameters, np.arange(len(self.genes))

        def levels_at(shift: float) -> NDArray[np.int64]:
            costs = losses + np.exp(log_prices + shift)[:, None] * parameters
            return np.asarray(costs.argmin(axis=1), dtype=np.int64)

        def fits(shift: float) -> bool:
            return bool(parameters[rows, levels_at(shift)].sum() <= budget)

        high = float(np.log(max(losses[:, 0].max(), _NO_PRICE)) - log_prices.min()) + 1.0
        low = high - _LARGEST_RATIO - float(np.ptp(log_prices))
        if fits(low):
            high = low
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return tuple(int(level) for level in levels_at(high))

    def energy(self, kept: float) -> Genome:
        """Return the energy allocation, the genome with the same price for all matrices."""
        return self.at_prices(np.zeros(len(self.genes)), kept)

    @cached_property
    def _table(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Parameters and losses of all matrices (matrices, levels); the loss of a missing level is infinite."""
        shape = len(self.genes), max(len(gene.ranks) for gene in self.genes)
        parameters, losses = np.zeros(shape), np.full(shape, np.inf)
        for row, gene in enumerate(self.genes):
            parameters[row, : len(gene.ranks)], losses[row, : len(gene.ranks)] = gene.parameters, gene.losses
        return parameters, losses
