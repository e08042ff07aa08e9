"""Score a candidate on growing slices of examples; drop it once a confidence bound puts it below the tolerance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_sieve.calibration.collect import direction_gradients
from optimum_sieve.evaluation.batches import input_device, make_batches
from optimum_sieve.evaluation.scores import check_scorable
from optimum_sieve.search.candidate import Outcome, joined


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.calibration.losses import Loss
    from optimum_sieve.metrics.identity import Metric
    from optimum_sieve.surgery.live import LiveRanks
    from optimum_sieve.tasks import Example
    from optimum_sieve.vocabulary import TaskVocabulary

    Windows = Mapping[str, tuple[int, int | None]]


# Confidence that a dropped candidate is below the tolerance.
DROP_CONFIDENCE = 0.95


class Scorer(ABC):
    """Score rank patterns on the examples of one task, against the dense model.

    Args:
        live (`LiveRanks`): The model.
        examples (`Sequence[Example]`): The shuffled examples: each slice is a fair sample.
        ends (`Sequence[int]`): Numbers of examples after which a candidate may be dropped, ascending to all of them.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        metric (`str` or `Callable`): The task's metric.
        batch_size (`int`): Rows per forward pass.
        calibration (`Sequence[Example]`): More examples for the shares and the calibration of labels.
        vocabulary (`TaskVocabulary`, *optional*): The model's reduced vocabulary; the dense model is scored without it.
        model_key (`str`, *optional*): Hash of the dense model. Default: computed where it is needed.
    """

    by_candidate: ClassVar[bool]

    def __init__(
        self,
        live: LiveRanks,
        examples: Sequence[Example],
        ends: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        *,
        metric: Metric,
        batch_size: int,
        calibration: Sequence[Example] = (),
        vocabulary: TaskVocabulary | None = None,
        model_key: str | None = None,
    ) -> None:
        self._known = [*examples, *calibration]
        check_scorable(self._known, metric)
        self._live = live
        self._examples = examples
        self._tokenizer = tokenizer
        self._metric = metric
        self._batch_size = batch_size
        self._vocabulary = vocabulary
        self._model_key = model_key
        self._ends = list(ends)
        # The last part holds the calibration examples.
        parts = [self._known[start:end] for start, end in zip([0, *ends], [*ends, None], strict=True)]
        self._parts = [part for part in parts if part]
        self._batches = [
            make_batches(part, tokenizer, batch_size=batch_size, candidates=self.by_candidate, model=live.model)
            for part in self._parts
        ]

    @abstractmethod
    def _prepare(self) -> None:
        """Score the dense model, unless that was done."""

    @abstractmethod
    def _score(self, number: int) -> Any:
        """Return the model's scores on a slice."""

    @abstractmethod
    def _outcome(self, scores: list[Any], *, complete: bool) -> Outcome:
        """Return the outcome on the first slices from the scores of each."""

    @abstractmethod
    def _loss(self, part: int) -> Loss:
        """Return the loss on the batches of a part, which is minimal at the dense model."""

    def slices(self, ranks: Ranks) -> Iterator[Outcome]:
        """Score `ranks` (a rank for every layer) slice by slice; yield the outcome so far after each."""
        self._prepare()
        scores: list[Any] = []
        for number, end in enumerate(self._ends):
            # The scorer of another task may have changed the ranks meanwhile.
            self._live.hold(ranks)
            scores.append(self._score(number))
            yield self._outcome(scores, complete=end == len(self._examples))

    def shares(self, ranks: Ranks, windows: Windows) -> dict[str, float]:
        """Return each layer's share of the loss from the dropped directions in its window, by one backward pass.

        A window is the first direction and the one after the last.
        """
        self._prepare()
        self._live.hold(ranks)
        total = dict.fromkeys(windows, 0.0)
        factors, device = self._live.factors(windows), input_device(self._live.model)
        for part, batches in enumerate(self._batches):
            moved = (batch.to(device) for batch in batches)
            for name, gradients in direction_gradients(self._live.model, factors, moved, self._loss(part)).items():
                total[name] -= 0.5 * float(gradients.sum()) / len(self._known)
        return total


class JointScorer:
    """Score rank patterns on one or several tasks, by a scorer for each; `weights` are those of the tasks' shares."""

    def __init__(self, parts: Sequence[Scorer], weights: Sequence[float] = (1.0,)) -> None:
        self._parts = list(parts)
        self._weights = list(weights)

    def score(self, ranks: Ranks, *, tolerance: float | None = None) -> Outcome:
        """Score `ranks` slice by slice; drop the candidate once it surely loses more than `tolerance` on some task."""
        runs = [part.slices(ranks) for part in self._parts]
        outcomes = [next(run) for run in runs]
        least = -float("inf") if tolerance is None else -tolerance
        while not all(outcome.complete for outcome in outcomes):
            if any(outcome.bound(1 - DROP_CONFIDENCE) < least for outcome in outcomes):
                break
            # Tasks may have different numbers of slices.
            outcomes = [next(run, outcome) for run, outcome in zip(runs, outcomes, strict=True)]
        return joined(outcomes)

    def shares(self, ranks: Ranks, windows: Windows) -> dict[str, float]:
        """Return the weighted sum over the tasks of [`Scorer.shares`]."""
        total = dict.fromkeys(windows, 0.0)
        for part, weight in zip(self._parts, self._weights, strict=True):
            for name, share in part.shares(ranks, windows).items():
                total[name] += weight * share
        return total
