"""Score rank patterns by the answers that a model writes and by the likelihood of the gold ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from optimum_sieve.backbone.modes import evaluating
from optimum_sieve.evaluation.batches import input_device
from optimum_sieve.evaluation.comparison import compare
from optimum_sieve.evaluation.generation import write_answers
from optimum_sieve.evaluation.likelihoods import check_finite
from optimum_sieve.evaluation.scores import evaluation_of_texts
from optimum_sieve.evaluation.teacher import teach
from optimum_sieve.search.candidate import Outcome

from .scorer import Scorer


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.calibration.losses import Loss
    from optimum_sieve.evaluation.teacher import Teacher
    from optimum_sieve.tasks import Example


class _Scores(NamedTuple):
    """Texts of some examples; negative log-likelihood and KL to the dense model, each the mean over the gold answer."""

    texts: list[str]
    losses: NDArray[np.float64]
    divergences: NDArray[np.float64]


class WrittenScorer(Scorer):
    """Score rank patterns on written answers. See [`Scorer`].

    The metric is that of the texts. The loss, which ranks the candidates, is that of the gold answers: it says more
    about a candidate than a few different texts. Shares are those of the divergence from the dense model, which is 0
    there, as the correction assumes.
    """

    by_candidate = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._teachers: list[Teacher] = []
        self._dense: list[_Scores] = []

    def _prepare(self) -> None:
        if self._dense:
            return
        self._live.hold({})
        model = cast("PreTrainedModel", self._live.model)
        # Losses and divergences refer to the dense model with this vocabulary, texts to the one with the full one.
        options: dict[str, Any] = {"batch_size": self._batch_size, "model_key": self._model_key, "progress": False}
        self._teachers = [teach(model, part, self._tokenizer, loss="vocabulary", **options) for part in self._parts]
        texts = self._dense_texts()
        starts = [0, *self._ends[:-1]]
        self._dense = [
            _Scores(texts[start:end], *self._losses(number))
            for number, (start, end) in enumerate(zip(starts, self._ends, strict=True))
        ]

    def _dense_texts(self) -> list[str]:
        if self._vocabulary is None:
            return self._write(self._examples, self._tokenizer)
        with self._vocabulary.undone() as tokenizer:
            return self._write(self._examples, tokenizer)

    def _write(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        written = write_answers(self._live.model, examples, tokenizer, batch_size=self._batch_size)
        return [answer.text for answer in written]

    def _losses(self, number: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return loss and divergence of each example of a part (count,), in nats.

        Raises:
            ValueError: If the model returns values that are not finite.
        """
        model, device, count = self._live.model, input_device(self._live.model), len(self._parts[number])
        losses, divergences = np.zeros(count), np.zeros(count)
        with evaluating(model):
            for batch in self._batches[number]:
                divergence, loss = self._teachers[number].losses(model, batch.to(device))
                indices = list(batch.indices)
                losses[indices], divergences[indices] = loss.double().cpu().numpy(), divergence.double().cpu().numpy()
        check_finite(np.isfinite(losses))
        return losses, divergences

    def _score(self, number: int) -> _Scores:
        return _Scores(self._write(self._parts[number], self._tokenizer), *self._losses(number))

    def _outcome(self, scores: list[_Scores], *, complete: bool) -> Outcome:
        pairs = list(zip(self._dense, scores, strict=False))
        dense, pruned = ([text for pair in pairs for text in pair[side].texts] for side in (0, 1))
        examples = self._examples[: len(pruned)]
        before, after = (evaluation_of_texts(texts, examples, self._metric) for texts in (dense, pruned))
        comparison = compare(before, after)
        return Outcome(
            mean=comparison.mean,
            # The probability that a text is right is unknown, so its chance stays in.
            expected=comparison.mean,
            differences=after.values - before.values,
            agreement=comparison.agreement,
            rises=np.concatenate([after.losses - before.losses for before, after in pairs]),
            # Rounding alone can make the KL of two equal distributions negative.
            kl=max(0.0, float(np.concatenate([part.divergences for part in scores]).mean())),
            complete=complete,
        )

    def _loss(self, part: int) -> Loss:
        teacher = self._teachers[part]
        return lambda model, batch: teacher.losses(model, batch)[0].sum()
