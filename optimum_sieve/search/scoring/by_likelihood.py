"""Score rank patterns by the distribution over each example's candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from optimum_sieve.evaluation.batches import log_likelihoods, make_batches
from optimum_sieve.evaluation.comparison import compare, expected_rises
from optimum_sieve.evaluation.likelihoods import candidate_scores
from optimum_sieve.evaluation.prefix import shared_prefix
from optimum_sieve.evaluation.scores import evaluation_of
from optimum_sieve.search.candidate import Outcome
from optimum_sieve.search.labels import calibrated_labels, expected_difference

from .scorer import Scorer


if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from optimum_sieve.calibration.losses import Loss
    from optimum_sieve.evaluation.batches import Batch


class CandidateScorer(Scorer):
    """Score rank patterns on labels or choices; labels are calibrated on all known examples. See [`Scorer`]."""

    by_candidate = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Those of a loss hold whole examples.
        self._scored = [
            make_batches(part, self._tokenizer, batch_size=self._batch_size, model=self._live.model, divide=True)
            for part in self._parts
        ]
        self._prefix = shared_prefix([batch for batches in self._scored for batch in batches])
        self._width = max(len(example.candidates) for example in self._known)
        self._dense: NDArray[np.float64] = np.zeros((0, self._width))
        self._labels: NDArray[np.float64] = np.zeros((0, self._width))

    def _prepare(self) -> None:
        if not len(self._dense):
            self._live.hold({})
            self._dense = self._score_dense()
            self._labels = calibrated_labels(evaluation_of(self._dense, self._known, self._metric))

    def _score_dense(self) -> NDArray[np.float64]:
        if self._vocabulary is None:
            return np.concatenate([self._score(number) for number in range(len(self._scored))])
        model = self._live.model
        with self._vocabulary.undone() as tokenizer:
            batches = make_batches(self._known, tokenizer, batch_size=self._batch_size, model=model, divide=True)
            return candidate_scores(model, batches, self._known)

    def _score(self, number: int) -> NDArray[np.float64]:
        """Return the log-likelihood of every candidate of a part (count, candidates), `-inf` for a missing one."""
        scores = candidate_scores(self._live.model, self._scored[number], self._parts[number], prefix=self._prefix)
        return np.pad(scores, ((0, 0), (0, self._width - scores.shape[1])), constant_values=-np.inf)

    def _outcome(self, scores: list[NDArray[np.float64]], *, complete: bool) -> Outcome:
        pruned_scores = np.concatenate(scores)
        count = len(pruned_scores)
        examples, labels = self._examples[:count], self._labels[:count]
        dense = evaluation_of(self._dense[:count], examples, self._metric)
        pruned = evaluation_of(pruned_scores, examples, self._metric)
        comparison = compare(dense, pruned)
        return Outcome(
            mean=comparison.mean,
            expected=expected_difference(labels, dense, pruned),
            differences=pruned.values - dense.values,
            agreement=comparison.agreement,
            rises=expected_rises(labels, dense, pruned),
            kl=comparison.kl or 0.0,
            complete=complete,
        )

    def _loss(self, part: int) -> Loss:
        start = sum(len(before) for before in self._parts[:part])
        labels = torch.from_numpy(self._labels).float()

        def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            scores = log_likelihoods(model, batch)
            expected = labels[[start + index for index in batch.indices], : scores.shape[1]].to(scores.device)
            log_probs = scores.log_softmax(dim=-1).masked_fill(~batch.present.to(scores.device), 0.0)
            return -(expected * log_probs).sum()

        return loss
