"""Score a candidate on growing slices of examples, and drop it as soon as a confidence bound says it cannot win."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import zip_longest
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, ClassVar

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.calibration.collect import direction_gradients
from optimum_sieve.evaluation.batches import input_device, make_batches
from optimum_sieve.evaluation.scores import check_scorable
from optimum_sieve.search.candidate import AnyOutcome, Outcome, joined
from optimum_sieve.tasks.metrics import standard_error


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.calibration.losses import Loss
    from optimum_sieve.search.candidate import Rival
    from optimum_sieve.surgery.live import LiveRanks
    from optimum_sieve.tasks import Example
    from optimum_sieve.tasks.text_metrics import Metric
    from optimum_sieve.vocabulary import TaskVocabulary


# A dropped candidate is lost to the search, so it is dropped only where this sure.
DROP_CONFIDENCE = 0.95


class Scorer(ABC):
    """Score rank patterns on one list of examples, of one task, against the dense model.

    Args:
        live (`LiveRanks`): The model.
        examples (`Sequence[Example]`): The examples, each slice of which is a fair sample.
        ends (`Sequence[int]`): Numbers of examples after which a candidate may be dropped, ascending to all of them.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        metric (`str` or `Callable`): The task's metric.
        batch_size (`int`): Rows per forward pass.
        calibration (`Sequence[Example]`): More labelled examples, which help to judge but score no candidate: the
            shares are measured on them too.
        vocabulary (`TaskVocabulary`, *optional*): That of the model, where the dense model is to have all its tokens.
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
    ) -> None:
        self._known = [*examples, *calibration]
        check_scorable(self._known, metric)
        self._live = live
        self._examples = examples
        self._tokenizer = tokenizer
        self._metric = metric
        self._batch_size = batch_size
        self._vocabulary = vocabulary
        self._ends = list(ends)
        starts = [0, *ends]
        # The last part is that of the calibration examples, which may be empty.
        self._parts = [self._known[start:end] for start, end in zip(starts, [*ends, None], strict=True)]
        self._batches = [
            make_batches(
                part, tokenizer, batch_size=batch_size, candidates=self.by_candidate, inputs=input_format(live.model)
            )
            for part in self._parts
            if part
        ]
        self.examples_scored = 0

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self._examples)

    @abstractmethod
    def _prepare(self) -> None:
        """Score the dense model, unless that was done."""

    @abstractmethod
    def _score(self, number: int) -> Any:
        """Return what the model makes of a slice."""

    @abstractmethod
    def _outcome(self, scores: list[Any], *, complete: bool) -> Outcome:
        """Return the outcome on the first slices, from what `_score` returned of each."""

    @abstractmethod
    def _loss(self, part: int) -> Loss:
        """Return the loss whose shares are measured, on the batches of a part."""

    def slices(self, ranks: Ranks) -> Iterator[Outcome]:
        """Score `ranks` (a rank for every layer) slice by slice; yield the outcome so far after each."""
        self._prepare()
        scores: list[Any] = []
        for number, end in enumerate(self._ends):
            # Another task's scorer may have held the dense model meanwhile.
            self._live.hold(ranks)
            scores.append(self._score(number))
            self.examples_scored += len(self._parts[number])
            yield self._outcome(scores, complete=end == self.count)

    def shares(self, ranks: Ranks, windows: Mapping[str, tuple[int, int | None]]) -> dict[str, float]:
        """Return the share of the loss of some dropped directions of each layer, by one backward pass.

        Args:
            ranks (`dict[str, int | None]`): A rank for every layer.
            windows (`Mapping[str, tuple[int, int | None]]`): First direction and the one after the last, by layer.
        """
        self._prepare()
        self._live.hold(ranks)
        total: dict[str, float] = dict.fromkeys(windows, 0.0)
        factors = self._live.factors(windows)
        device = input_device(self._live.model)
        for part, batches in enumerate(self._batches):
            moved = (batch.to(device) for batch in batches)
            found = direction_gradients(self._live.model, factors, moved, self._loss(part))
            for name, gradients in found.items():
                total[name] -= 0.5 * float(gradients.sum()) / len(self._known)
        return total


class JointScorer:
    """Score rank patterns on one or several tasks.

    Args:
        parts (`Sequence[Scorer]`): The scorer of each task, all of one model.
        weights (`Sequence[float]`): How much each task counts in the shares of the loss, as in the moments.
    """

    def __init__(self, parts: Sequence[Scorer], weights: Sequence[float] = (1.0,)) -> None:
        self._parts = list(parts)
        self._weights = list(weights)

    def score(self, ranks: Ranks, *, tolerance: float | None = None, rivals: Sequence[Rival] = ()) -> AnyOutcome:
        """Score `ranks` on a slice of every task's examples after the other, until it is surely lost on one.

        Args:
            ranks (`dict[str, int | None]`): A rank for every layer.
            tolerance (`float`, *optional*): Loss accepted; a candidate surely below it on some task is dropped.
            rivals (`Sequence[Rival]`): For each task what a candidate must keep up with there; it is dropped where it
                is surely worse on some task. May be empty.
        """
        runs = [part.slices(ranks) for part in self._parts]
        outcomes = [next(run) for run in runs]
        while not all(outcome.complete for outcome in outcomes):
            pairs = zip_longest(outcomes, rivals)
            if any(_is_lost(outcome, tolerance, rival) for outcome, rival in pairs):
                break
            # One task may have fewer slices than another.
            outcomes = [next(run, outcome) for run, outcome in zip(runs, outcomes, strict=True)]
        return joined(outcomes)

    def shares(self, ranks: Ranks, windows: Mapping[str, tuple[int, int | None]]) -> dict[str, float]:
        """Return the share of the loss of some dropped directions of each layer, the tasks' weighted sum.

        Args:
            ranks (`dict[str, int | None]`): A rank for every layer.
            windows (`Mapping[str, tuple[int, int | None]]`): First direction and the one after the last, by layer.
        """
        total = dict.fromkeys(windows, 0.0)
        for part, weight in zip(self._parts, self._weights, strict=True):
            for name, share in part.shares(ranks, windows).items():
                total[name] += weight * share
        return total


def _is_lost(outcome: Outcome, tolerance: float | None, rival: Rival | None) -> bool:
    """Whether a candidate is below the tolerance, or its loss above what its rival allows, surely."""
    if tolerance is not None and outcome.bound(1 - DROP_CONFIDENCE) < -tolerance:
        return True
    if rival is None:
        return False
    excess = outcome.rises - rival.rises[: outcome.count] - rival.allowance
    return bool(excess.mean() > NormalDist().inv_cdf(DROP_CONFIDENCE) * standard_error(excess))
