r"""Classification metrics with the contribution of each example. Plain numpy, unless a module of evaluate scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .module_metric import ModuleMetric
from .module_scores import module_score, score_by_module
from .scored import Scored, jackknifed


if TYPE_CHECKING:
    from numpy.typing import NDArray


CLASS_METRICS = ("accuracy", "macro_f1")


def score_classes(metric: str | ModuleMetric, predictions: NDArray[np.int64], targets: NDArray[np.int64]) -> Scored:
    r"""Score predicted classes against gold classes.

    `"accuracy"` is the fraction of matches. `"macro_f1"` is the unweighted mean F1 over the classes that occur in
    `targets`, so that two models average over the same classes; a class never predicted counts 0.

    Args:
        metric (`str` or `ModuleMetric`):
            `"accuracy"`, `"macro_f1"`, or a module of evaluate, which gets the classes as numbers.
        predictions (`np.ndarray` of shape `(count,)`):
            Predicted classes.
        targets (`np.ndarray` of shape `(count,)`):
            Gold classes.

    Returns:
        [`Scored`]: The score and each example's value.

    Raises:
        ValueError: If `metric` is unknown.

    Example:

    ```python
    >>> score_classes("accuracy", np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])).score
    0.75

    ```
    """
    if isinstance(metric, ModuleMetric):
        return score_by_module(metric, predictions.tolist(), targets.tolist())
    if metric == "accuracy":
        matches = (predictions == targets).astype(np.float64)
        return Scored(float(matches.mean()), matches)
    if metric == "macro_f1":
        return _score_macro_f1(predictions, targets)
    raise ValueError(f"`metric` must be one of {', '.join(CLASS_METRICS)}, got {metric!r}.")


def majority_class_score(metric: str | ModuleMetric, targets: NDArray[np.int64]) -> float:
    """Score the constant prediction of the most frequent gold class; NaN if a module of evaluate gives no number."""
    if isinstance(metric, ModuleMetric):
        return module_score(metric, most_frequent(targets).tolist(), targets.tolist())
    return score_classes(metric, most_frequent(targets), targets).score


def most_frequent(targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return predictions (count,) of the most frequent gold class."""
    return np.full_like(targets, np.bincount(targets).argmax())


def _score_macro_f1(predictions: NDArray[np.int64], targets: NDArray[np.int64]) -> Scored:
    classes = np.unique(targets)
    predicted = (predictions[:, None] == classes).astype(np.int64)
    gold = (targets[:, None] == classes).astype(np.int64)
    # F1 = 2 tp / (predicted + gold); in integers, so that leaving one example out is exact.
    doubled, total = 2 * predicted * gold, predicted + gold
    score = _mean_ratio(doubled.sum(axis=0), total.sum(axis=0))
    left_out = _mean_ratio(doubled.sum(axis=0) - doubled, total.sum(axis=0) - total)
    return jackknifed(score, left_out)


def _mean_ratio(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> Any:
    """Mean over the last axis of `numerator / denominator`, 0 where the denominator is 0."""
    return (numerator / np.maximum(denominator, 1)).mean(axis=-1)
