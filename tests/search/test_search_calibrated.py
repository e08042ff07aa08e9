"""Labels as the calibrated dense model expects them."""

import numpy as np
import pytest
from scipy.special import log_softmax

from optimum_sieve.evaluation.comparison import expected_rises
from optimum_sieve.evaluation.scores import Evaluation
from optimum_sieve.search.labels import calibrated_labels, expected_difference


TEMPERATURE, BIAS = 2.0, np.array([0.8, 0.0, -0.8])


def make_evaluation(log_probs: np.ndarray, targets: np.ndarray) -> Evaluation:
    """Make an evaluation by accuracy."""
    predictions = log_probs.argmax(axis=1)
    values = (predictions == targets).astype(float)
    return Evaluation(
        metric="accuracy", score=float(values.mean()), standard_error=0.0, majority_score=0.0, predictions=predictions,
        targets=targets, values=values, log_probs=log_probs, fingerprint="same",
    )  # fmt: skip


def make_world(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Make a dense model that is too unsure and leans to a label, a pruned one, gold labels and their distribution."""
    rng = np.random.default_rng(seed)
    dense = log_softmax(rng.normal(0.0, 0.8, (count, 3)), axis=1)
    pruned = log_softmax(dense + rng.normal(0.0, 0.3, (count, 3)) + [0.1, 0.0, -0.1], axis=1)
    truth = np.exp(log_softmax(TEMPERATURE * dense + BIAS, axis=1))
    targets = (rng.random((count, 1)) > truth.cumsum(axis=1)).sum(axis=1)
    return dense, pruned, targets, truth


def test_calibration_finds_the_labels_distribution():
    dense, _, targets, truth = make_world(4000)
    labels = calibrated_labels(make_evaluation(dense, targets))
    assert labels.sum(axis=1) == pytest.approx(np.ones(4000))
    assert np.abs(labels - truth).mean() < 0.02
    assert np.abs(np.exp(dense) - truth).mean() > 0.1


def test_few_examples_change_little():
    dense, _, targets, _ = make_world(2)
    labels = calibrated_labels(make_evaluation(dense, targets))
    assert np.abs(labels - np.exp(dense)).max() < 0.35


def test_expected_figures_are_those_of_the_gold_labels_with_less_noise():
    gold, expected, accuracy, expected_accuracy = [], [], [], []
    for seed in range(60):
        dense, pruned, targets, _ = make_world(300, seed)
        before, after = make_evaluation(dense, targets), make_evaluation(pruned, targets)
        labels = calibrated_labels(before)
        rows = np.arange(300)
        gold.append((dense[rows, targets] - pruned[rows, targets]).mean())
        expected.append(expected_rises(labels, before, after).mean())
        accuracy.append(after.score - before.score)
        expected_accuracy.append(expected_difference(labels, before, after))
    for chance, steady in ((gold, expected), (accuracy, expected_accuracy)):
        assert np.mean(steady) == pytest.approx(np.mean(chance), abs=3 * np.std(chance) / 60**0.5)
        assert np.std(steady) < 0.8 * np.std(chance)


def test_missing_candidates_add_nothing():
    dense, pruned, targets, _ = make_world(200)
    padding = np.full((200, 1), -np.inf)
    before, after = make_evaluation(dense, targets), make_evaluation(pruned, targets)
    wide_before = make_evaluation(np.hstack([dense, padding]), targets)
    wide_after = make_evaluation(np.hstack([pruned, padding]), targets)
    labels = calibrated_labels(wide_before)
    assert labels[:, 3].max() == 0
    assert labels[:, :3] == pytest.approx(calibrated_labels(before), abs=1e-4)
    assert expected_rises(labels, wide_before, wide_after) == pytest.approx(
        expected_rises(labels[:, :3], before, after)
    )


def test_a_model_that_predicts_the_same_has_no_difference():
    dense, _, targets, _ = make_world(50)
    before, sharper = make_evaluation(dense, targets), make_evaluation(log_softmax(3 * dense, axis=1), targets)
    assert expected_difference(calibrated_labels(before), before, sharper) == 0.0
