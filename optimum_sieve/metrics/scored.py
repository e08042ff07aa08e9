r"""A score with the contribution of each example, by which two models are compared. Plain numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from numpy.typing import NDArray


# Where the standard error comes from.
EXAMPLES, JACKKNIFE = "examples", "jackknife"


@dataclass(frozen=True, eq=False)
class Scored:
    r"""A metric over examples and its jackknife pseudo-values.

    Args:
        score (`float`):
            The metric \(\theta\) over all \(n\) examples.
        values (`np.ndarray` of shape `(count,)`):
            \(n \theta - (n - 1) \theta_{-i}\), where \(\theta_{-i}\) leaves out example \(i\). For a mean they are
            the averaged terms. Their standard error is the jackknife standard error; the differences between two
            models' values give the paired one.
        error_method (`str`):
            `"examples"` for a mean over examples, else `"jackknife"`, with the number of groups where examples are
            left out in groups.
    """

    score: float
    values: NDArray[np.float64]
    error_method: str = EXAMPLES

    @property
    def standard_error(self) -> float:
        """Sample standard error of the score."""
        return standard_error(self.values)


def standard_error(values: NDArray[np.float64]) -> float:
    r"""Sample standard deviation of `values` over \(\sqrt{n}\)."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def jackknifed(score: float, left_out: NDArray[np.float64]) -> Scored:
    """Return a score with its pseudo-values, from the scores (count,) without each example."""
    count = len(left_out)
    return Scored(float(score), count * score - (count - 1) * left_out, JACKKNIFE)


def jackknifed_by_group(score: float, left_out: NDArray[np.float64], groups: NDArray[np.int64]) -> Scored:
    r"""Return a score with values whose standard error is that of the delete-group jackknife.

    A group of \(m_g\) of the \(n\) examples has the pseudo-value \(p_g = h_g \theta - (h_g - 1) \theta_{-g}\) with
    \(h_g = n / m_g\). Each of its examples gets \(p_g\), moved away from the mean of all by the factor that turns the
    standard error of \(n\) independent values into that of \(G\) groups. Two models whose examples are in the same
    groups are compared by the differences of these values.

    Reference: Busing, Meijer and van der Leeden (1999), *Delete-m jackknife for unequal m*.

    Args:
        score (`float`):
            The metric over all examples.
        left_out (`np.ndarray` of shape `(groups,)`):
            The metric without each group.
        groups (`np.ndarray` of shape `(count,)`):
            Number of each example's group.

    Example: groups of one example give the values of the jackknife.

    ```python
    >>> jackknifed_by_group(2.0, np.array([1.5, 2.0, 2.5]), np.array([0, 1, 2])).values.round(6).tolist()
    [3.0, 2.0, 1.0]

    ```
    """
    count, sizes = len(groups), np.bincount(groups)
    pseudo = (count / sizes * score - (count / sizes - 1) * left_out)[groups]
    # Variances: n (n - 1) of the values, and G (h - 1) of the groups.
    spread = np.sqrt(count * (count - 1) / (len(sizes) * (count - sizes)))[groups]
    deviations = spread * (pseudo - pseudo.mean())
    values = pseudo.mean() + deviations - deviations.mean()
    return Scored(float(score), values, f"{JACKKNIFE}, {len(sizes)} groups")
