"""Score a candidate on growing slices of examples, and drop it as soon as a confidence bound says it cannot win."""

from __future__ import annotations

from itertools import zip_longest
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import torch

from optimum_sieve.calibration import direction_gradients
from optimum_sieve.comparison import compare, expected_rises
from optimum_sieve.evaluation import check_scorable, evaluation_of
from optimum_sieve.inputs import input_format
from optimum_sieve.likelihoods import candidate_scores
from optimum_sieve.prefix import shared_prefix
from optimum_sieve.scoring import input_device, log_likelihoods, make_batches
from optimum_sieve.tasks.metrics import standard_error

from .calibrated import calibrated_labels, expected_difference
from .candidate import AnyOutcome, Outcome, joined


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.scoring import Batch
    from optimum_sieve.tasks import Example
    from optimum_sieve.tasks.text_metrics import Metric
    from optimum_sieve.vocabulary import TaskVocabulary

    from .candidate import Rival
    from .genome import Ranks
    from .live import LiveRanks


# A dropped candidate is lost to the search, so it is dropped only where this sure.
DROP_CONFIDENCE = 0.95


class Scorer:
    """Score rank patterns on one list of examples, of one task, against the dense model.

    Args:
        live (`LiveRanks`): The model.
        examples (`Sequence[Example]`): The examples, each slice of which is a fair sample.
        ends (`Sequence[int]`): Numbers of examples after which a candidate may be dropped, ascending to all of them.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        metric (`str` or `Callable`): The task's metric.
        batch_size (`int`): Rows per forward pass.
        calibration (`Sequence[Example]`): More labelled examples: the labels are calibrated, and the shares measured,
            on them too, but no candidate is scored on them.
        vocabulary (`TaskVocabulary`, *optional*): That of the model, where the dense model is to have all its tokens.
    """

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
        self._metric = metric
        self._batch_size = batch_size
        self._vocabulary = vocabulary
        self._ends = list(ends)
        starts = [0, *ends]
        # The last part is that of the calibration examples, which may be empty.
        self._parts = [self._known[start:end] for start, end in zip(starts, [*ends, None], strict=True)]
        inputs = input_format(live.model)
        self._batches = [
            make_batches(part, tokenizer, batch_size=batch_size, inputs=inputs) for part in self._parts if part
        ]
        self._prefix = shared_prefix([batch for batches in self._batches for batch in batches])
        self._width = max(len(example.candidates) for example in self._known)
        self._dense: NDArray[np.float64] | None = None
        self._labels: NDArray[np.float64] | None = None
        self.examples_scored = 0

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self._examples)

    def slices(self, ranks: Ranks) -> Iterator[Outcome]:
        """Score `ranks` (a rank for every layer) slice by slice; yield the outcome so far after each."""
        self._calibrated()
        scores: list[NDArray[np.float64]] = []
        for number, end in enumerate(self._ends):
            # Another task's scorer may have held the dense model meanwhile.
            self._live.hold(ranks)
            scores.append(self._slice(number))
            yield self._outcome(np.concatenate(scores), complete=end == self.count)

    def shares(self, ranks: Ranks, windows: Mapping[str, tuple[int, int | None]]) -> dict[str, float]:
        """Return the share of the loss of some dropped directions of each layer, by one backward pass.

        Args:
            ranks (`dict[str, int | None]`): A rank for every layer.
            windows (`Mapping[str, tuple[int, int | None]]`): First direction and the one after the last, by layer.
        """
        labels = torch.from_numpy(self._calibrated()).float()
        starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self._live.hold(ranks)
        total: dict[str, float] = dict.fromkeys(windows, 0.0)
        factors = self._live.factors(windows)
        device = input_device(self._live.model)
        for start, batches in zip(starts, self._batches, strict=False):

            def loss(model: nn.Module, batch: Batch, start: int = int(start)) -> torch.Tensor:
                scores = log_likelihoods(model, batch)
                expected = labels[[start + index for index in batch.indices], : scores.shape[1]].to(scores.device)
                log_probs = scores.log_softmax(dim=-1).masked_fill(~batch.present.to(scores.device), 0.0)
                return -(expected * log_probs).sum()

            moved = (batch.to(device) for batch in batches)
            for name, gradients in direction_gradients(self._live.model, factors, moved, loss).items():
                total[name] -= 0.5 * float(gradients.sum()) / len(self._known)
        return total

    def _calibrated(self) -> NDArray[np.float64]:
        """Score the dense model, once; return the calibrated labels."""
        if self._dense is None or self._labels is None:
            self._live.hold({})
            self._dense = self._score_dense()
            self._labels = calibrated_labels(evaluation_of(self._dense, self._known, self._metric))
        return self._labels

    def _score_dense(self) -> NDArray[np.float64]:
        if self._vocabulary is None:
            return np.concatenate([self._slice(number) for number in range(len(self._batches))])
        model = self._live.model
        with self._vocabulary.undone() as tokenizer:
            batches = make_batches(self._known, tokenizer, batch_size=self._batch_size, inputs=input_format(model))
            self.examples_scored += len(self._known)
            return candidate_scores(model, batches, self._known)

    def _slice(self, number: int) -> NDArray[np.float64]:
        part = self._parts[number]
        scores = candidate_scores(self._live.model, self._batches[number], part, prefix=self._prefix)
        self.examples_scored += len(part)
        return np.pad(scores, ((0, 0), (0, self._width - scores.shape[1])), constant_values=-np.inf)

    def _outcome(self, scores: NDArray[np.float64], *, complete: bool) -> Outcome:
        assert self._dense is not None
        assert self._labels is not None
        examples = self._examples[: len(scores)]
        dense = evaluation_of(self._dense[: len(scores)], examples, self._metric)
        pruned = evaluation_of(scores, examples, self._metric)
        labels = self._labels[: len(scores)]
        comparison = compare(dense, pruned)
        assert comparison.kl is not None
        return Outcome(
            mean=comparison.mean,
            expected=expected_difference(labels, dense, pruned),
            differences=pruned.values - dense.values,
            agreement=comparison.agreement,
            rises=expected_rises(labels, dense, pruned),
            kl=comparison.kl,
            complete=complete,
        )


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
