r"""What a number of examples can show about a paired difference in score. Never imports torch.

With score differences \(d_i\) in \([-1, 1]\), mostly 0, a lower confidence bound of their mean by the normal
approximation is too narrow where few examples change. `certain_error` corrects it; the other functions say, before a
run, what the corrected bound can show.
"""

from __future__ import annotations

import math
from statistics import NormalDist


# Probability of another outcome that the rest of a test's examples may have to be left out.
_DOUBT = 0.01


def certain_error(mean: float, standard_error: float, count: int) -> float:
    r"""Widen the standard error of a paired difference so that its lower bound holds where few examples change.

    Without a change the standard error is 0, although `count` examples cannot rule out a loss of one in `count`; and
    where almost all changes are losses, the distribution is skewed. So one more lost example is added to the squares,
    \(s = 1 + \sum_i d_i^2\), and the net share of losses among the changes to the error:

    \[ \frac{1}{n} \left( \sqrt{s - n \bar d^2} + \frac{1 - n \bar d}{s} \right) \]

    with the share between 0 and 1. The second term is the first-order correction for skewness and for the whole steps
    of a count, \((z^2 + 2) / 3\) examples times the skewness, near \(z\) for the confidences in use. It vanishes where
    as many examples improve as get worse. A model that loses exactly the tolerance passes in at most 10.4 % of cases
    at confidence 0.9, from 50 to 800 examples; without the correction in up to 60 %.

    Reference: Johnson (1978), *Modified t tests and confidence intervals for asymmetrical populations*.

    Args:
        mean (`float`): Mean difference.
        standard_error (`float`): Its standard error, the sample standard deviation over the root of `count`.
        count (`int`): Number of examples.

    Example:

    ```python
    >>> certain_error(mean=0.0, standard_error=0.0, count=100)
    0.02
    >>> round(certain_error(mean=0.0, standard_error=0.01, count=1000), 4)
    0.0101

    ```
    """
    squares = 1 + count * (count - 1) * standard_error**2 + count * mean**2
    lost = min(1.0, max(0.0, (1 - count * mean) / squares))
    return (math.sqrt(squares - count * mean**2) + lost) / count


# A first look takes one in so many examples, and at least so many.
LOOKS, LEAST_LOOK = 4, 100


def is_settled(
    mean: float, standard_error: float, count: int, total: int, *, tolerance: float, confidence: float
) -> bool:
    r"""Return whether the first examples of a test decide it, as the rest would hardly change the outcome.

    A share \(f\) of the examples has a mean \(m\) with an error \(s\), see [`certain_error`]. The mean of all is then
    expected at \(m\) with the standard deviation \(s \sqrt{1 - f}\), and passes if it is at least
    \(z s \sqrt f\) above minus the tolerance. If that has a probability of at most .01, or at least .99, the first
    ones decide. Failing early cannot accept a loss beyond the tolerance; passing early at a quarter accepts one that
    is exactly the tolerance with a probability of less than .005, instead of .1 for all examples at confidence .9.

    Reference: Lan, Simon and Halperin (1982), *Stochastically curtailed tests in long-term clinical trials*.

    Args:
        mean (`float`): Mean difference of the first examples.
        standard_error (`float`): Its standard error.
        count (`int`): Number of the first examples.
        total (`int`): Number of all examples, more than `count`.
        tolerance (`float`): Largest acceptable drop.
        confidence (`float`): One-sided confidence of the bound.

    Example:

    ```python
    >>> options = {"count": 100, "total": 400, "tolerance": 0.02, "confidence": 0.9}
    >>> [is_settled(mean, 0.03, **options) for mean in (-0.08, -0.02, 0.04, 0.1)]
    [True, False, False, True]

    ```
    """
    error, share = certain_error(mean, standard_error, count), count / total
    margin = NormalDist().inv_cdf(confidence) * error
    passes = NormalDist().cdf((mean + tolerance - math.sqrt(share) * margin) / (error * math.sqrt(1 - share)))
    # With a confidence near 1 the first ones alone may be too few for what all would show.
    return passes <= _DOUBT or (passes >= 1 - _DOUBT and mean - margin >= -tolerance)


def least_tolerance(count: int, *, agreement: float, confidence: float, probability: float = 0.5) -> float:
    """Return the tolerance that a model without any true loss passes with a probability.

    Args:
        count (`int`): Number of selection examples.
        agreement (`float`): Assumed share of examples whose score is unchanged; as many of the others improve as get
            worse.
        confidence (`float`): One-sided confidence of the bound.
        probability (`float`): Probability of passing.

    Example:

    ```python
    >>> [round(least_tolerance(400, agreement=share, confidence=0.9), 4) for share in (0.9, 0.8)]
    [0.0206, 0.0288]

    ```
    """
    deviation, margin = _spread(count, agreement, confidence)
    return margin + NormalDist().inv_cdf(probability) * deviation


def passing_probability(tolerance: float, count: int, *, agreement: float, confidence: float) -> float:
    """Return the probability that a model without any true loss passes; the arguments are of [`least_tolerance`]."""
    deviation, margin = _spread(count, agreement, confidence)
    return NormalDist().cdf((tolerance - margin) / deviation)


def examples_needed(tolerance: float, *, agreement: float, confidence: float, probability: float = 0.5) -> int:
    """Return the least count whose [`least_tolerance`] is at most a positive `tolerance`."""

    def shows(count: int) -> bool:
        options = {"agreement": agreement, "confidence": confidence, "probability": probability}
        return least_tolerance(count, **options) <= tolerance

    high = 2
    while not shows(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high


def _spread(count: int, agreement: float, confidence: float) -> tuple[float, float]:
    """Return the standard deviation of the mean difference, and the margin of its bound below it."""
    deviation = math.sqrt((1 - agreement) / count)
    return deviation, NormalDist().inv_cdf(confidence) * certain_error(0.0, deviation, count)
