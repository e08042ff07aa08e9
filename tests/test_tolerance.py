"""The search on the kept fraction finds the edge of the tolerance, and does not take noise for a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from optimum_sieve.comparison import Comparison
from optimum_sieve.tolerance import ToleranceError, search_kept_fraction


if TYPE_CHECKING:
    from collections.abc import Callable


def cliff(edge: float, *, loss: float = 0.1, standard_error: float = 0.0) -> Callable[[float], Comparison]:
    """Lose nothing from the kept fraction `edge` on, and `loss` below it."""
    return lambda kept: Comparison(
        mean=0.0 if kept >= edge else -loss, standard_error=standard_error, agreement=0.9, kl=0.01, count=100
    )


@pytest.mark.parametrize("edge", [0.02, 0.3, 0.5, 0.77, 0.98])
def test_the_least_fraction_within_the_tolerance(edge: float) -> None:
    kept, trials = search_kept_fraction(cliff(edge), tolerance=0.02, confidence=0.9, steps=8)
    assert edge <= kept < edge + 2**-8
    assert len(trials) == 8
    assert kept == min(trial["kept"] for trial in trials if trial["lower_bound"] >= -0.02)
    assert set(trials[0]) == {"kept", "lower_bound", "mean", "standard_error", "agreement", "kl", "count"}


def test_a_loss_hidden_by_noise_is_not_accepted() -> None:
    noisy = cliff(0.5, loss=0.015, standard_error=0.01)
    # Below the edge the mean is within two points, its lower bound is not; above the edge both are.
    kept, _ = search_kept_fraction(noisy, tolerance=0.02, confidence=0.9, steps=7)
    assert 0.5 <= kept < 0.51
    kept, _ = search_kept_fraction(noisy, tolerance=0.02, confidence=0.5, steps=7)
    assert kept < 0.01


def test_no_fraction_within_the_tolerance() -> None:
    message = (
        r"`tolerance` must leave room for pruning, got 0\.02: keeping \d+\.\d% .* costs 0\.1000 \+- 0\.0100\. Accept"
    )
    with pytest.raises(ToleranceError, match=message):
        search_kept_fraction(cliff(1.1, standard_error=0.01), tolerance=0.02, confidence=0.9, steps=4)
