r"""Score predictions with a module of the evaluate library, and find what each example contributes.

A module returns one number for all examples. If it is a mean over examples, the numbers of single examples are the
contributions: some modules return one number per example, others do so with `use_aggregator=False`, and else every
example is scored alone, and parts of the examples must have the mean of these numbers. Any other module, such as BLEU,
has the contributions of the jackknife, which leaves out one example after the other, or one of `GROUPS` groups of
examples where that would take more calls. The order of the examples must not matter to a module.
"""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve._messages import cut, listed, shown

from .files import module_name
from .loading import load_module, takes_lists
from .scored import Scored, jackknifed, jackknifed_by_group


if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .module_metric import ModuleMetric


# Index of a class, or a text; and the gold class, or the accepted answers.
Prediction = int | str
Reference = int | Sequence[str]

# Most calls of a module for the jackknife, but for classes that no gold answer has. A standard error from so many
# groups has an error of 7 %.
GROUPS = 100
# Examples for the check before a run, and for the first check whether a module is a mean.
_FEW = 16
# Some modules compute in single precision.
_CLOSE = 1e-6
_MOST_ALONE, _MOST_KNOWN = 100_000, 16


def score_by_module(metric: ModuleMetric, predictions: Sequence[Prediction], references: Sequence[Reference]) -> Scored:
    """Score predictions against references, with the contribution of each example.

    Args:
        metric ([`ModuleMetric`][optimum_sieve.metrics.module_metric.ModuleMetric]):
            The module and the name of its score.
        predictions (`Sequence[int]` or `Sequence[str]`):
            Predicted classes or texts.
        references (`Sequence[int]` or `Sequence[Sequence[str]]`):
            Gold classes, or the accepted answers of each example. A module gets all of them if it takes lists, else
            the first.

    Returns:
        [`Scored`][optimum_sieve.metrics.scored.Scored]: The score and each example's value, both times `scale`, and
            negated if smaller scores are better.

    Raises:
        ValueError: If the module must not be run, cannot score the examples, or returns no finite number.
    """
    found = _scorer(metric, isinstance(predictions[0], str)).scored(list(predictions), list(references))
    return Scored(metric.factor * found.score, metric.factor * found.values, found.error_method)


def module_score(metric: ModuleMetric, predictions: Sequence[Prediction], references: Sequence[Reference]) -> float:
    """Return the score alone, of predictions for which the module may be undefined: NaN if it is."""
    scorer = _scorer(metric, isinstance(predictions[0], str))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score = float(scorer.result(list(predictions), list(references), finite=False).mean())
    except ValueError:
        return math.nan
    return metric.factor * score


def check_module(metric: ModuleMetric, references: Sequence[Reference], *, texts: bool) -> None:
    """Load a module and score a few gold answers with it, before any long work.

    Raises:
        FileNotFoundError: If there is no such module.
        ImportError: If evaluate or a package that the module imports is not installed.
        ValueError: If the module must not be run, does not take texts or classes, cannot score them, lacks the key,
            or gives more than 1 to right answers.
    """
    scorer = _scorer(metric, texts)
    some = list(references[:_FEW])
    if some:
        gold = [reference if isinstance(reference, int) else reference[0] for reference in some]
        score = metric.scale * float(scorer.result(gold, some, finite=False).mean())
        if abs(score) > 1 + _CLOSE:
            raise ValueError(
                f"`metric.scale` must bring scores to at most 1, as tolerances expect, got {score:.4g} for the right "
                f"answers from {metric.module!r}. Set `scale: 0.01` for percent."
            )


@lru_cache(16)
def _scorer(metric: ModuleMetric, texts: bool) -> _ModuleScorer:
    return _ModuleScorer(metric, texts)


class _ModuleScorer:
    """A loaded module that takes classes or texts."""

    def __init__(self, metric: ModuleMetric, texts: bool) -> None:
        self._metric = metric
        self._texts = texts
        self._module = load_module(metric)
        self._lists = takes_lists(metric, self._module, texts)
        self._args = dict(metric.args)
        # Such a module, `rouge`, else returns the middle of a bootstrap of the mean, which differs by chance.
        if "use_aggregator" in inspect.signature(self._module._compute).parameters:
            self._args.setdefault("use_aggregator", False)
        self._has_one_per_example = False
        self._alone = lru_cache(_MOST_ALONE)(self._score_alone)
        # A search compares every candidate with the same answers of the dense model.
        self._known = lru_cache(_MOST_KNOWN)(self._scored)

    def scored(self, predictions: list[Any], references: list[Any]) -> Scored:
        """Return the score with the contribution of each example."""
        return self._known(tuple(self._pairs(predictions, references)))

    def _scored(self, pairs: tuple[tuple[Any, Any], ...]) -> Scored:
        predictions, references = ([pair[side] for pair in pairs] for side in (0, 1))
        whole = self.result(predictions, references)
        if whole.ndim:
            return Scored(float(whole.mean()), whole)
        with warnings.catch_warnings():
            # Modules warn of a missing class, and parts of the examples may lack one.
            warnings.simplefilter("ignore")
            values = self._values(float(whole), predictions, references)
            if values is not None:
                return Scored(float(whole), values)
            return self._jackknifed(float(whole), predictions, references)

    def result(self, predictions: list[Any], references: list[Any], *, finite: bool = True) -> NDArray[np.float64]:
        """Return the module's number, an array without dimensions, or its numbers (count,) of the examples."""
        found = self._call(predictions, references)
        per_example = self._is_per_example(found, predictions, references)
        parts = [_plain(part) for part in (found if per_example else [found])]
        if not all(isinstance(part, numbers.Real) and not isinstance(part, bool) for part in parts):
            raise ValueError(
                f"`metric.key` must name a number, got {shown(found)} as {self._metric.key!r} of "
                f"{self._metric.module!r}. Choose another key, or `args` that give one number."
            )
        try:
            values = np.array([float(part) for part in parts], dtype=np.float64)
        except OverflowError:
            values = np.full(len(parts), np.inf)
        if finite and not np.isfinite(values).all():
            raise ValueError(
                f"`metric` must give a finite number, got {values[~np.isfinite(values)][0]} as {self._metric.key!r} of "
                f"{self._metric.module!r} for {len(predictions):,} examples. It may be undefined where all answers are "
                "the same: choose another metric."
            )
        return values if per_example else values.reshape(())

    def _is_per_example(self, found: Any, predictions: list[Any], references: list[Any]) -> bool:
        count = len(predictions)
        if not _is_list(found) or len(found) != count:
            return False
        if not self._has_one_per_example and count > 1:
            # It may also be one number for each class, as many as there are examples.
            fewer = self._call(predictions[1:], references[1:])
            self._has_one_per_example = _is_list(fewer) and len(fewer) == count - 1
        return self._has_one_per_example or count == 1

    def _call(self, predictions: list[Any], references: list[Any]) -> Any:
        """Return the value of the key.

        Raises:
            ValueError: If the module fails or lacks the key.
        """
        name = self._metric.module
        if self._texts:
            references = [list(accepted) if self._lists else accepted[0] for accepted in references]
        try:
            scores = self._module.compute(predictions=predictions, references=references, **self._args)
        # A module that ends the process would end a run without a word.
        except (Exception, SystemExit) as error:
            # It may still hold these examples, and would add the next ones to them.
            self._module = load_module(self._metric)
            reason = cut(f"{type(error).__name__}: {error}", 400)
            raise ValueError(
                f"`metric` must be able to score {len(predictions):,} examples, got an error of {name!r}: {reason}. "
                "Check `metric.args`, and that the module fits the task's answers."
            ) from error
        if not isinstance(scores, dict):
            # Some modules, such as `wer`, return the number alone.
            scores = {module_name(name): scores}
        if self._metric.key not in scores:
            raise ValueError(
                f"`metric.key` must be one of the scores of {name!r}, {listed(scores)}, got {self._metric.key!r}."
            )
        return scores[self._metric.key]

    def _score_alone(self, prediction: Prediction, reference: Reference) -> float:
        return float(self.result([prediction], [reference]))

    def _values(self, whole: float, predictions: list[Any], references: list[Any]) -> NDArray[np.float64] | None:
        """Return the scores of single examples (count,) if the module is their mean, else `None`."""
        pairs = self._pairs(predictions, references)

        def is_mean(part: slice, values: NDArray[np.float64]) -> bool:
            return _is_close(self.result(predictions[part], references[part]), values[part].mean())

        try:
            if not is_mean(slice(_FEW), np.array([self._alone(*pair) for pair in pairs[:_FEW]])):
                return None
            values = np.array([self._alone(*pair) for pair in pairs])
            halves = (slice(0, None, 2), slice(1, None, 2), slice(len(pairs) // 2))
            if _is_close(whole, values.mean()) and all(is_mean(half, values) for half in halves):
                return values
        except ValueError:
            # It cannot score one example alone.
            pass
        return None

    def _jackknifed(self, whole: float, predictions: list[Any], references: list[Any]) -> Scored:
        count, pairs = len(predictions), self._pairs(predictions, references)

        def without(left: NDArray[np.bool_]) -> float:
            kept = np.flatnonzero(~left)
            return float(self.result([predictions[index] for index in kept], [references[index] for index in kept]))

        # Without one or another of equal pairs the score is the same. The rule is the same for two models.
        if count <= GROUPS or (not self._texts and len(set(references)) ** 2 <= GROUPS):
            firsts = {pair: index for index, pair in reversed(list(enumerate(pairs)))}
            scores = {pair: without(np.arange(count) == index) for pair, index in firsts.items()}
            return jackknifed(whole, np.array([scores[pair] for pair in pairs]))
        # Groups by chance, the same for two models.
        groups = np.random.default_rng(0).permutation(count) % GROUPS
        left_out = np.array([without(groups == group) for group in range(GROUPS)])
        return jackknifed_by_group(whole, left_out, groups)

    def _pairs(self, predictions: list[Any], references: list[Any]) -> list[tuple[Any, Any]]:
        """Return each example as a value that can be a key."""
        return list(zip(predictions, (tuple(each) if self._texts else each for each in references), strict=True))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1


def _plain(value: Any) -> Any:
    """Return a number of numpy or torch as one of Python."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def _is_close(one: Any, other: Any) -> bool:
    return math.isclose(float(one), float(other), rel_tol=_CLOSE, abs_tol=_CLOSE)
