"""The bound of a paired difference holds as often as it says, and the examples that a tolerance needs are enough."""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.stats import multinomial

from optimum_sieve.allocation.certainty import (
    certain_error,
    examples_needed,
    is_settled,
    least_tolerance,
    passing_probability,
)
from optimum_sieve.evaluation.comparison import Comparison
from optimum_sieve.metrics.scored import standard_error


if TYPE_CHECKING:
    from numpy.typing import NDArray


def outcomes(count: int, better: float, worse: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return all numbers of better and worse examples that matter, (outcomes, 2), and their probabilities."""
    most = min(count, int(count * (better + worse) + 8 * np.sqrt(count * (better + worse)) + 8))
    pairs = np.array([(up, down) for up in range(most + 1) for down in range(most + 1 - up)])
    rest = count - pairs.sum(axis=1, keepdims=True)
    return pairs, multinomial.pmf(np.hstack([pairs, rest]), count, [better, worse, 1 - better - worse])


def compared(up: int, down: int, count: int) -> Comparison:
    """Compare two models; the second is better on `up` examples and worse on `down`."""
    differences = np.repeat([1.0, -1.0, 0.0], [up, down, count - up - down])
    return Comparison(
        mean=differences.mean(), standard_error=standard_error(differences), agreement=0.0, kl=None, count=count
    )


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("count", [50, 100, 200])
@pytest.mark.parametrize("loss", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("changed", [1.0, 1.5, 4.0])
def test_a_loss_of_the_tolerance_passes_no_more_often_than_it_may(
    count: int, loss: float, changed: float, confidence: float
) -> None:
    worse = loss * (changed + 1) / 2
    pairs, chances = outcomes(count, worse - loss, worse)
    assert chances.sum() == pytest.approx(1, abs=1e-6)
    comparisons = [compared(*pair, count) for pair in pairs]
    passed = [comparison.lower_bound(confidence) >= -loss for comparison in comparisons]
    assert chances[passed].sum() <= 1 - confidence + 0.008


def test_without_the_correction_it_passes_too_often() -> None:
    pairs, chances = outcomes(100, 0.0, 0.01)
    comparisons = [compared(*pair, 100) for pair in pairs]
    plain = [c.mean - NormalDist().inv_cdf(0.9) * c.standard_error >= -0.01 for c in comparisons]
    assert chances[plain].sum() > 0.3


def test_the_correction_is_for_few_changes_and_for_losses() -> None:
    assert certain_error(0.0, 0.0, 50) == pytest.approx(2 / 50)
    many = compared(40, 40, 400)
    assert certain_error(many.mean, many.standard_error, 400) == pytest.approx(many.standard_error, rel=0.01)
    gains, losses = compared(5, 0, 400), compared(0, 5, 400)
    assert gains.standard_error == losses.standard_error
    wider = [certain_error(case.mean, case.standard_error, 400) - case.standard_error for case in (gains, losses)]
    # One more changed example counts for both, the skewness for losses alone.
    assert wider[0] == pytest.approx((np.sqrt(6 - 25 / 400) - np.sqrt(5 - 25 / 400)) / 400, rel=0.02)
    assert wider[1] == pytest.approx(wider[0] + 1 / 400)


@pytest.mark.parametrize(("count", "agreement"), [(200, 0.9), (400, 0.8), (400, 0.95), (1600, 0.85)])
@pytest.mark.parametrize("probability", [0.5, 0.8])
def test_a_model_without_loss_passes_as_often_as_foretold(count: int, agreement: float, probability: float) -> None:
    tolerance = least_tolerance(count, agreement=agreement, confidence=0.9, probability=probability)
    assert passing_probability(tolerance, count, agreement=agreement, confidence=0.9) == pytest.approx(probability)
    changed = (1 - agreement) / 2
    drawn = np.random.default_rng(0).multinomial(count, [changed, changed, agreement], size=2000)
    passed = [compared(up, down, count).lower_bound(0.9) >= -tolerance for up, down, _ in drawn]
    # The mean moves in steps of an example, so a step of the binomial is in doubt.
    step = 0.4 / np.sqrt(count * (1 - agreement))
    assert np.mean(passed) == pytest.approx(probability, abs=step + 0.03)


@pytest.mark.parametrize("agreement", [1.0 - 1e-9, 0.95, 0.8])
@pytest.mark.parametrize("tolerance", [0.005, 0.02, 0.05])
def test_the_examples_needed_are_the_fewest(tolerance: float, agreement: float) -> None:
    found = examples_needed(tolerance, agreement=agreement, confidence=0.9)
    needed = [least_tolerance(count, agreement=agreement, confidence=0.9) for count in (found - 1, found)]
    assert needed[1] <= tolerance < needed[0]


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.99])
def test_a_first_look_accepts_a_loss_of_the_tolerance_no_more_often(confidence: float) -> None:
    rng = np.random.default_rng(0)
    passed, without, early = [], [], []
    for _ in range(6000):
        # Loses exactly two points: 6 % get worse, 4 % better.
        differences = rng.choice([-1.0, 1.0, 0.0], p=[0.06, 0.04, 0.9], size=400)
        first, whole = (compared(int((each > 0).sum()), int((each < 0).sum()), len(each))
                        for each in (differences[:100], differences))  # fmt: skip
        looks = {"total": 400, "tolerance": 0.02, "confidence": confidence}
        early.append(is_settled(first.mean, first.standard_error, first.count, **looks))
        decisive = first if early[-1] else whole
        passed.append(decisive.lower_bound(confidence) >= -0.02)
        without.append(whole.lower_bound(confidence) >= -0.02)
    assert np.mean(passed) <= np.mean(without) + 0.004
    assert 0.01 < np.mean(early) < 0.5


def test_a_first_look_decides_on_clear_gains_and_losses_alone() -> None:
    looks = {"total": 1000, "tolerance": 0.02, "confidence": 0.9}
    for up, down, settled in [(20, 5, True), (12, 12, False), (5, 40, True)]:
        first = compared(up, down, 250)
        assert is_settled(first.mean, first.standard_error, first.count, **looks) == settled
        if settled:
            assert (first.lower_bound(0.9) >= -0.02) == (up > down)
