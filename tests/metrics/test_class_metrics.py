"""Metrics over classes, against scikit-learn and the textbook jackknife."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score

from optimum_sieve.metrics.class_metrics import most_frequent, score_classes


def random_classes(rng: np.random.Generator, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, 4, count), rng.choice(3, count, p=[0.7, 0.27, 0.03])


def test_macro_f1_equals_scikit_learns(rng: np.random.Generator) -> None:
    for _ in range(20):
        predictions, targets = random_classes(rng)
        expected = f1_score(targets, predictions, labels=np.unique(targets), average="macro", zero_division=0)
        assert score_classes("macro_f1", predictions, targets).score == pytest.approx(expected)


def test_macro_f1_values_are_jackknife_pseudo_values(rng: np.random.Generator) -> None:
    predictions, targets = random_classes(rng)
    labels, count = np.unique(targets), len(targets)
    scored = score_classes("macro_f1", predictions, targets)
    left_out = [
        f1_score(np.delete(targets, i), np.delete(predictions, i), labels=labels, average="macro", zero_division=0)
        for i in range(count)
    ]
    np.testing.assert_allclose(scored.values, count * scored.score - (count - 1) * np.array(left_out))
    # Textbook form of the jackknife standard error.
    variance = (count - 1) / count * np.sum((np.array(left_out) - np.mean(left_out)) ** 2)
    assert scored.standard_error == pytest.approx(math.sqrt(variance))


def test_standard_error_of_macro_f1_matches_repeated_sampling(rng: np.random.Generator) -> None:
    def sample() -> tuple[np.ndarray, np.ndarray]:
        targets = rng.choice(3, 400, p=[0.5, 0.3, 0.2])
        return np.where(rng.random(400) < 0.7, targets, rng.integers(0, 3, 400)), targets

    scored = [score_classes("macro_f1", *sample()) for _ in range(300)]
    spread = np.std([one.score for one in scored])
    assert np.mean([one.standard_error for one in scored]) == pytest.approx(spread, rel=0.15)


def test_scores_of_the_most_frequent_class() -> None:
    targets = np.array([2, 2, 2, 0])
    assert score_classes("accuracy", most_frequent(targets), targets).score == 0.75
    # Class 2: F1 = 2*3 / (4 + 3); class 0 is never predicted.
    assert score_classes("macro_f1", most_frequent(targets), targets).score == pytest.approx((6 / 7 + 0) / 2)
