r"""Predicted loss, corrected by what was measured. Does not import torch.

The moments predict a loss for every matrix, and their sum for a genome: how much a departure from the energy allocation
should cost. What is measured shows, beside that, a slope: making some kinds of matrices or some layers smaller than the
prediction says pays, making others larger does. Both together are a linear model of how a candidate's size at the limit
departs from the energy allocation's, with few enough coefficients (one for each kind of matrix and for each band of
layers, one for the predicted loss) to be fitted to some ten candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from optimum_sieve.search.genome import Genome, SearchSpace


NUM_BANDS = 8
# Standard deviations known beforehand: of a slope (kept fraction per unit of logarithmic price), and of the factor on
# the predicted loss about 1.
_SLOPE, _FACTOR = 0.015, 0.4
# Beyond this a price says only that a matrix is dense or gone.
_FARTHEST_PRICE = 3.0


def group_members(space: SearchSpace) -> NDArray[np.float64]:
    """Return which kind and which band of layers each matrix belongs to, as ones in (matrices, groups)."""
    bands = np.minimum((space.depths * NUM_BANDS).astype(int), NUM_BANDS - 1)
    members = [[kind == own for own in space.kinds] for kind in sorted(set(space.kinds))]
    members += [list(bands == band) for band in sorted(set(bands))]
    return np.array(members, dtype=np.float64).T


def mean_offsets(space: SearchSpace, genome: Genome, members: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far each group's prices lie from the common one, which is the energy allocation's, on average."""
    offsets = np.clip(space.log_prices(genome), -_FARTHEST_PRICE, _FARTHEST_PRICE)
    means: NDArray[np.float64] = members.T @ offsets / members.sum(axis=0)
    return means


@dataclass(frozen=True, eq=False)
class Predictor:
    """Gaussian posterior of the linear model's coefficients.

    Args:
        mean (`numpy.ndarray` of shape `(groups + 1,)`): Slopes of the groups, then the factor on the predicted loss.
        root (`numpy.ndarray` of shape `(groups + 1, groups + 1)`): `root @ root.T` is the covariance.
    """

    mean: NDArray[np.float64]
    root: NDArray[np.float64]

    @classmethod
    def fit(
        cls, features: NDArray[np.float64], measured: NDArray[np.float64], errors: NDArray[np.float64]
    ) -> Predictor:
        r"""Fit by Bayesian linear regression with a Gaussian prior.

        Args:
            features (`numpy.ndarray` of shape `(candidates, groups + 1)`):
                Price offsets of the groups, then the departure that the predicted losses alone say.
            measured (`numpy.ndarray` of shape `(candidates,)`): Departure from the energy allocation, in kept fraction.
            errors (`numpy.ndarray` of shape `(candidates,)`): Standard error of each.

        Reference: Bishop (2006), *Pattern recognition and machine learning*, equations 3.50 and 3.51.
        """
        num_features = features.shape[1]
        start, prior = np.zeros(num_features), np.full(num_features, _SLOPE**-2)
        start[-1], prior[-1] = 1.0, _FACTOR**-2
        weighted = features.T / errors**2
        precision = np.diag(prior) + weighted @ features
        mean = np.asarray(np.linalg.solve(precision, prior * start + weighted @ measured), dtype=np.float64)
        root: NDArray[np.float64] = np.linalg.inv(np.linalg.cholesky(precision)).T
        return cls(mean, root)

    def sample(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Draw coefficients from the posterior."""
        return self.mean + self.root @ rng.normal(size=len(self.mean))
