"""Score a model's answers to examples of a task with any metric, next to always giving the most frequent answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .class_metrics import CLASS_METRICS, majority_class_score, most_frequent, score_classes
from .module_metric import ModuleMetric
from .module_scores import check_module
from .text_metrics import TEXT_METRICS, majority_text_score, score_texts


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from optimum_sieve.tasks import Example

    from .identity import Metric
    from .scored import Scored


def score_candidates(
    metric: Metric, predictions: NDArray[np.int64], examples: Sequence[Example]
) -> tuple[Scored, float]:
    """Score the indices of the most likely candidates (count,); return the majority's score too."""
    targets = targets_of(examples)
    if isinstance(metric, str | ModuleMetric):
        return score_classes(metric, predictions, targets), majority_class_score(metric, targets)
    gold = [(example.answer.strip(),) for example in examples]
    scored, majority = (
        score_texts(metric, _texts(indices, examples), gold) for indices in (predictions, most_frequent(targets))
    )
    return scored, majority.score


def score_written(metric: Metric, texts: Sequence[str], examples: Sequence[Example]) -> tuple[Scored, float]:
    """Score generated texts; return the score of the most frequent answer too."""
    accepted = [example.accepted for example in examples]
    return score_texts(metric, texts, accepted), majority_text_score(metric, accepted)


def check_metric(metric: Metric, examples: Sequence[Example]) -> None:
    """Check that a metric can score examples with gold answers, see also [`check_code`].

    Raises:
        ValueError: If not, or an example lacks its gold candidate.
    """
    written = examples[0].generation is not None
    known = TEXT_METRICS if written else CLASS_METRICS
    if isinstance(metric, str) and metric not in known:
        raise ValueError(f"`metric` must be one of {', '.join(known)}, got {metric!r}.")
    if not written:
        targets_of(examples)
    check_code(metric, examples)


def check_code(metric: Metric, examples: Sequence[Example]) -> None:
    """Load a metric that is a module of the evaluate library, and score those examples that have gold answers with it.

    Raises:
        FileNotFoundError: If there is no such module.
        ImportError: If evaluate or a package that the module imports is not installed.
        ValueError: If the module cannot score such examples.
    """
    if not isinstance(metric, ModuleMetric):
        return
    written = examples[0].generation is not None
    gold = [example.accepted if written else example.target for example in examples]
    check_module(metric, [each for each in gold if each is not None and each != ()], texts=written)


def load_code(metric: Metric, *, written: bool) -> None:
    """Load a metric that is a module of the evaluate library, before there are examples for [`check_code`].

    Raises:
        FileNotFoundError: If there is no such module.
        ImportError: If evaluate or a package that the module imports is not installed.
        ValueError: If the module must not be run, or does not take texts or classes.
    """
    if isinstance(metric, ModuleMetric):
        check_module(metric, [], texts=written)


def targets_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the indices of the gold candidates (count,)."""
    return np.array([_target(index, example) for index, example in enumerate(examples)], dtype=np.int64)


def _texts(indices: NDArray[Any], examples: Sequence[Example]) -> list[str]:
    # The majority index can exceed an example's number of candidates.
    return [
        example.candidates[index].strip() if index < len(example.candidates) else ""
        for index, example in zip(indices, examples, strict=True)
    ]


def _target(index: int, example: Example) -> int:
    if len(example.candidates) < 2 or example.target is None or not 0 <= example.target < len(example.candidates):
        raise ValueError(
            f"`examples[{index}]` must have at least two candidates and the index of the gold one, "
            f"got {len(example.candidates)} candidates and target {example.target}."
        )
    return example.target
