"""The search on the kept fraction finds the edge of the tolerance, and does not take noise for a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from optimum_sieve.allocation.tolerance import SMALLEST_KEPT, ToleranceError, search_kept_fraction
from optimum_sieve.evaluation.comparison import Comparison


if TYPE_CHECKING:
    from collections.abc import Callable


def cliff(
    *edges: float, loss: float = 0.1, standard_error: float = 0.0, count: int = 10_000
) -> Callable[[float], dict[str, Comparison]]:
    """Lose nothing on each task from its kept fraction in `edges` on, and `loss` below it."""
    return lambda kept: {
        f"task {place}": Comparison(
            mean=0.0 if kept >= edge else -loss, standard_error=standard_error, agreement=0.9, kl=0.01, count=count
        )
        for place, edge in enumerate(edges)
    }


@pytest.mark.parametrize("edge", [0.03, 0.3, 0.5, 0.77, 0.98])
def test_the_least_fraction_within_the_tolerance(edge: float) -> None:
    kept, trials = search_kept_fraction(cliff(edge), tolerance=0.02, confidence=0.9, steps=8)
    assert edge <= kept < edge + 2**-8
    assert len(trials) == 8
    assert kept == min(trial["kept"] for trial in trials if trial["lower_bound"] >= -0.02)
    assert set(trials[0]) == {
        *("kept", "asked", "lower_bound", "mean", "standard_error", "agreement", "kl", "count", "accepted"),
    }


@pytest.mark.parametrize(("edge", "kept", "count"), [(0.0, 0.02, 6), (0.0201, 0.0256, 10), (0.019, 0.02, 6)])
def test_no_size_below_two_percent_is_tried(edge: float, kept: float, count: int) -> None:
    found, trials = search_kept_fraction(cliff(edge), tolerance=0.02, confidence=0.9, steps=10)
    assert found == pytest.approx(kept, rel=0.3)
    assert found >= SMALLEST_KEPT == min(trial["asked"] for trial in trials)
    assert len(trials) == count


def test_the_bisection_ends_at_a_size_that_is_small_enough() -> None:
    options = {"tolerance": 0.02, "confidence": 0.9, "steps": 6, "enough": 0.1}
    kept, trials = search_kept_fraction(cliff(0.05), **options)
    assert (kept, [trial["asked"] for trial in trials]) == (0.0625, [0.5, 0.25, 0.125, 0.0625])
    # A larger one is looked for as exactly as otherwise.
    kept, trials = search_kept_fraction(cliff(0.12), **options)
    assert (kept, len(trials)) == (0.125, 6)


def test_a_record_has_the_fraction_that_the_ranks_keep() -> None:
    asked = [0.5, 0.25, 0.375, 0.3125]
    options = {"tolerance": 0.02, "confidence": 0.9, "steps": 4}
    kept, trials = search_kept_fraction(cliff(0.3), **options, kept_by_ranks=lambda asked: asked - 0.03)
    assert [trial["asked"] for trial in trials] == asked
    assert [trial["kept"] for trial in trials] == [each - 0.03 for each in asked]
    # Ranks are allocated for it.
    assert kept == 0.3125


def test_a_loss_hidden_by_noise_is_not_accepted() -> None:
    noisy = cliff(0.5, loss=0.015, standard_error=0.01)
    # Below the edge the mean is within two points, its lower bound is not; above the edge both are.
    kept, _ = search_kept_fraction(noisy, tolerance=0.02, confidence=0.9, steps=7)
    assert 0.5 <= kept < 0.51
    kept, _ = search_kept_fraction(noisy, tolerance=0.02, confidence=0.5, steps=7)
    assert kept == SMALLEST_KEPT


def test_no_fraction_within_the_tolerance() -> None:
    message = (
        r"No size meets tolerance=0\.02: keeping \d+\.\d% .* already loses 0\.1000 \+- 0\.0100 on 10,000 selection "
        r"examples, at most 0\.1128\. Increase `tolerance`"
    )
    with pytest.raises(ToleranceError, match=message):
        search_kept_fraction(cliff(1.1, standard_error=0.01), tolerance=0.02, confidence=0.9, steps=4)


def test_few_examples_cannot_show_that_nothing_is_lost() -> None:
    with pytest.raises(
        ToleranceError, match=r"already loses 0\.0000 \+- 0\.0000 on 100 selection .* at most 0\.0256\."
    ):
        search_kept_fraction(cliff(0.0, count=100), tolerance=0.02, confidence=0.9, steps=4)
    kept, _ = search_kept_fraction(cliff(0.0, count=130), tolerance=0.02, confidence=0.9, steps=4)
    assert kept == 2**-4


@pytest.mark.parametrize("edges", [(0.3, 0.7), (0.7, 0.3), (0.7, 0.7, 0.1)])
def test_the_worst_of_several_tasks_decides(edges: tuple[float, ...]) -> None:
    kept, trials = search_kept_fraction(cliff(*edges), tolerance=0.02, confidence=0.9, steps=8)
    assert max(edges) <= kept < max(edges) + 2**-8
    first = trials[0]
    assert list(first["tasks"]) == [f"task {place}" for place in range(len(edges))]
    assert first["lower_bound"] == min(task["lower_bound"] for task in first["tasks"].values())
    assert set(first["tasks"]["task 0"]) == {"lower_bound", "mean", "standard_error", "agreement", "kl", "count"}


def test_the_task_that_no_fraction_holds_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"loses 0\.1000 \+- 0\.0100 on 10,000 selection examples of 'task 1', at"):
        search_kept_fraction(cliff(0.2, 1.1, standard_error=0.01), tolerance=0.02, confidence=0.9, steps=4)


def test_no_further_size_is_tried_without_time() -> None:
    left = iter([True, False])
    settings = {"tolerance": 0.02, "confidence": 0.9, "steps": 6}
    kept, trials = search_kept_fraction(cliff(0.02), **settings, goes_on=lambda: next(left))
    assert (kept, len(trials)) == (0.25, 2)
