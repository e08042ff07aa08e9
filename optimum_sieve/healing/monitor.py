"""Scores of a model on part of the selection split while it is healed, compared with the dense model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_sieve.evaluation.comparison import compare
from optimum_sieve.evaluation.scores import Evaluation, evaluate
from optimum_sieve.run.workdir import content_key
from optimum_sieve.tasks.task import metric_source


if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example
    from optimum_sieve.tasks.text_metrics import Metric


@dataclass(frozen=True, kw_only=True)
class Monitored:
    """The monitored examples of one task.

    Args:
        task (`str`): Name of the task.
        examples (`Sequence[Example]`): Part of its selection split.
        metric (`str` or `Callable`): Metric of the task.
        dense (`Evaluation`): The dense model's evaluation of these examples.
    """

    task: str
    examples: Sequence[Example]
    metric: Metric
    dense: Evaluation

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the scores depend on, besides the model."""
        return content_key(examples=self.dense.fingerprint, metric=metric_source(self.metric), score=self.dense.score)


@dataclass(frozen=True, kw_only=True)
class SelectionMonitor:
    """Scores a model while it is healed, and compares it with the dense model.

    Args:
        parts (`Sequence[Monitored]`): The monitored examples of each task.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        batch_size (`int`): Rows per forward pass.
    """

    parts: Sequence[Monitored]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the scores depend on, besides the model."""
        fingerprints = [part.fingerprint for part in self.parts]
        return fingerprints[0] if len(fingerprints) == 1 else content_key(parts=fingerprints)

    @property
    def count(self) -> int:
        """Number of examples monitored, over all tasks."""
        return sum(part.dense.count for part in self.parts)

    def __call__(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the score and, except for generated answers, the KL divergence from the dense model.

        With several tasks `"score"` is the lowest difference to the dense model's score, `"kl"` the largest divergence,
        and `"tasks"` has the figures of each task.
        """
        scores: dict[str, dict[str, float]] = {}
        differences: list[float] = []
        for part in self.parts:
            healed = evaluate(
                model, part.examples, self.tokenizer, metric=part.metric, batch_size=self.batch_size,
                progress=False,
            )  # fmt: skip
            difference = compare(part.dense, healed)
            scores[part.task] = {"score": healed.score, **({} if difference.kl is None else {"kl": difference.kl})}
            differences.append(difference.mean)
        if len(scores) == 1:
            return dict(*scores.values())
        divergences = [score["kl"] for score in scores.values() if "kl" in score]
        worst = {"score": min(differences), **({"kl": max(divergences)} if divergences else {})}
        return {**worst, "tasks": scores}
