"""Score a candidate on growing slices of examples, and drop it as soon as a confidence bound says it cannot win."""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.comparison import compare
from optimum_sieve.evaluation import candidate_scores, check_scorable, evaluation_of
from optimum_sieve.prefix import shared_prefix
from optimum_sieve.scoring import make_batches, max_positions
from optimum_sieve.tasks.metrics import standard_error

from .calibrated import calibrated_labels, expected_difference, expected_rises
from .candidate import Outcome


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example

    from .candidate import Rival
    from .genome import Ranks
    from .live import LiveRanks


# A dropped candidate is lost to the search, so it is dropped only where this sure.
DROP_CONFIDENCE = 0.95


class Scorer:
    """Score rank patterns on one list of examples against the dense model.

    Args:
        live (`LiveRanks`): The model.
        examples (`Sequence[Example]`): The examples, each slice of which is a fair sample.
        ends (`Sequence[int]`): Numbers of examples after which a candidate may be dropped, ascending to all of them.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        metric (`str`): The task's metric.
        batch_size (`int`): Rows per forward pass.
    """

    def __init__(
        self,
        live: LiveRanks,
        examples: Sequence[Example],
        ends: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        *,
        metric: str,
        batch_size: int,
    ) -> None:
        check_scorable(examples, metric)
        self._live = live
        self._examples = examples
        self._metric = metric
        self._ends = list(ends)
        self._slices = [examples[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        limit = max_positions(live.model)
        self._batches = [
            make_batches(part, tokenizer, batch_size=batch_size, max_length=limit) for part in self._slices
        ]
        self._prefix = shared_prefix([batch for batches in self._batches for batch in batches])
        self._width = max(len(example.candidates) for example in examples)
        self._dense: NDArray[np.float64] | None = None
        self._labels: NDArray[np.float64] | None = None
        self.examples_scored = 0

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self._examples)

    def score(
        self,
        ranks: Ranks,
        *,
        tolerance: float | None = None,
        rival: Rival | None = None,
    ) -> Outcome:
        """Score `ranks` slice by slice.

        Args:
            ranks (`dict[str, int | None]`): A rank for every layer.
            tolerance (`float`, *optional*): Loss accepted; a candidate surely below it is dropped.
            rival (`Rival`, *optional*): A candidate surely worse than this one is dropped.
        """
        if self._dense is None:
            self._live.hold({})
            self._dense = np.concatenate([self._slice(number) for number in range(len(self._slices))])
            self._labels = calibrated_labels(evaluation_of(self._dense, self._examples, self._metric))
        self._live.hold(ranks)
        scores: list[NDArray[np.float64]] = []
        for number, end in enumerate(self._ends):
            scores.append(self._slice(number))
            outcome = self._outcome(np.concatenate(scores), complete=end == self.count)
            if not outcome.complete and _is_lost(outcome, tolerance, rival):
                break
        return outcome

    def _slice(self, number: int) -> NDArray[np.float64]:
        part = self._slices[number]
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
        return Outcome(
            mean=comparison.mean,
            expected=expected_difference(labels, dense, pruned),
            differences=pruned.values - dense.values,
            agreement=comparison.agreement,
            rises=expected_rises(labels, dense, pruned),
            kl=comparison.kl,
            complete=complete,
        )


def _is_lost(outcome: Outcome, tolerance: float | None, rival: Rival | None) -> bool:
    """Whether a candidate is below the tolerance, or its loss above what its rival allows, surely."""
    if tolerance is not None and outcome.bound(1 - DROP_CONFIDENCE) < -tolerance:
        return True
    if rival is None:
        return False
    excess = outcome.rises - rival.rises[: outcome.count] - rival.allowance
    return bool(excess.mean() > NormalDist().inv_cdf(DROP_CONFIDENCE) * standard_error(excess))
