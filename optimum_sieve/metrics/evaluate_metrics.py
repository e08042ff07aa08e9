"""This package's metrics as modules of the evaluate library, which is imported with this module.

Each computes what `score_classes` or `score_texts` does, from the same code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import datasets
import evaluate
import numpy as np

from optimum_sieve._messages import closest, listed, shown

from .class_metrics import score_classes
from .text_metrics import LIST_METRICS, last_number, score_texts


if TYPE_CHECKING:
    from .scored import Scored


_SQUAD = "Rajpurkar et al. (2016), SQuAD: 100,000+ questions for machine comprehension of text."
_TEXT = datasets.Value("string")


class _Metric(evaluate.Metric):
    """A metric with the options of `compute` that all have: `standard_error=True` adds that of the score."""

    # Name in task files, and name of the score.
    task_name: ClassVar[str]
    key: ClassVar[str]
    source: ClassVar[str] = ""
    inputs: ClassVar[Any]

    def __init__(self, config_name: str | None = None, *, keep_in_memory: bool = True, **options: Any) -> None:
        super().__init__(config_name, keep_in_memory=keep_in_memory, **options)

    def _info(self) -> evaluate.MetricInfo:
        inputs = "predictions, references: one of each example.\n    standard_error (`bool`): Add that of the score."
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation=self.source,
            inputs_description=f"\nArgs:\n    {inputs}\n\nReturns:\n    `dict[str, float]`: `{self.key}`.\n",
            features=list(self.inputs) if isinstance(self.inputs, tuple) else self.inputs,
        )

    def _compute(self, *, predictions: Any, references: Any, standard_error: bool = False) -> dict[str, float]:
        scored = self._scored(predictions, references)
        return {self.key: scored.score, **({"standard_error": scored.standard_error} if standard_error else {})}

    def _scored(self, predictions: Any, references: Any) -> Scored:
        raise NotImplementedError


class _ClassMetric(_Metric):
    inputs = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})

    def _scored(self, predictions: Any, references: Any) -> Scored:
        return score_classes(self.task_name, np.asarray(predictions), np.asarray(references))


class _TextMetric(_Metric):
    # References are texts, or lists of accepted texts of which the best counts.
    inputs = (
        datasets.Features({"predictions": _TEXT, "references": datasets.Sequence(_TEXT)}),
        datasets.Features({"predictions": _TEXT, "references": _TEXT}),
    )

    def _scored(self, predictions: Any, references: Any) -> Scored:
        accepted = [[each] if isinstance(each, str) else list(each) for each in references]
        if not all(accepted) or (self.task_name in LIST_METRICS and any(len(each) > 1 for each in accepted)):
            most = "the whole list as one text" if self.task_name in LIST_METRICS else "at least one text"
            raise ValueError(f"`references` must hold {most} for each example, got {shown(references)}.")
        return score_texts(self.task_name, predictions, accepted)


class Accuracy(_ClassMetric):
    """Fraction of predicted classes that equal the gold ones."""

    task_name = key = "accuracy"


class MacroF1(_ClassMetric):
    """Unweighted mean F1 over the classes that occur in the references; a class never predicted counts 0."""

    task_name, key = "macro_f1", "f1"


class ExactMatch(_TextMetric):
    """Fraction of texts that equal an accepted one, both without case, punctuation and articles, as in SQuAD."""

    task_name = key = "exact_match"
    source = _SQUAD


class TokenF1(_TextMetric):
    """Mean F1 of the words, normalized as in SQuAD; the best accepted text counts."""

    task_name = key = "f1"
    source = _SQUAD


class RougeL(_TextMetric):
    """Mean F1 of the longest common subsequence of words, without stemming; the best accepted text counts."""

    task_name = key = "rougeL"
    source = "Lin (2004), ROUGE: A package for automatic evaluation of summaries."


class Numeric(_TextMetric):
    """Fraction of texts whose last number equals the last number of an accepted text."""

    task_name = key = "numeric"

    def _scored(self, predictions: Any, references: Any) -> Scored:
        for each in references:
            for text in [each] if isinstance(each, str) else each:
                if last_number(text) is None:
                    raise ValueError(f"`references` must contain numbers, got {shown(text)}.")
        return super()._scored(predictions, references)


class SetF1(_TextMetric):
    """Mean F1 of two sets of items, separated by line breaks, commas or semicolons."""

    task_name, key = "set_f1", "f1"


class EntityF1(_TextMetric):
    """F1 of the items of all texts together, one a line, each as often as it is written."""

    task_name, key = "entity_f1", "f1"


_METRICS: dict[str, type[_Metric]] = {
    metric.task_name: metric for metric in (Accuracy, MacroF1, ExactMatch, TokenF1, RougeL, Numeric, SetF1, EntityF1)
}


def load(name: str, **options: Any) -> evaluate.Metric:
    """Make a metric of this package as a module of evaluate, without network.

    Args:
        name (`str`):
            Its name in task files: `"accuracy"`, `"macro_f1"`, `"exact_match"`, `"f1"` (of words, also
            `"token_f1"`), `"rougeL"`, `"numeric"`, `"set_f1"` or `"entity_f1"`.
        options (`Any`):
            Arguments of [`evaluate.Metric`](https://huggingface.co/docs/evaluate/package_reference/main_classes), such
            as `keep_in_memory`, which is `True` by default, and `cache_dir`.

    Returns:
        `evaluate.Metric`: The metric, for `compute`, `add_batch` and `evaluate.combine`. Its score is named as that of
            evaluate: `f1` of `macro_f1`, `token_f1`, `set_f1` and `entity_f1`. With `standard_error=True`, `compute`
            also returns the `standard_error` of the score.

    Raises:
        ValueError: If there is no metric of this name.

    Example:

    ```python
    >>> from optimum_sieve.metrics import load
    >>> load("token_f1").compute(predictions=["in the Middle Rhine"], references=[["Middle Rhine", "Rhine"]])
    {'f1': 0.8}

    ```
    """
    name = "f1" if name == "token_f1" else name
    if name not in _METRICS:
        close = closest(name, _METRICS)
        hint = f"Did you mean {close!r}? " if close else ""
        raise ValueError(
            f"`name` must be one of {listed(_METRICS)}, got {shown(name)}. {hint}Modules of the Hub are loaded by "
            "`evaluate.load`."
        )
    return _METRICS[name](**options)
