"""How well a model does on a part of the selection split while it is healed, beside the dense one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_sieve.evaluation.comparison import compare
from optimum_sieve.evaluation.scores import Evaluation, evaluate
from optimum_sieve.run.workdir import content_key


if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.tasks import Example


@dataclass(frozen=True, kw_only=True)
class Monitored:
    """What is monitored of one task.

    Args:
        task (`str`): Name of the task.
        examples (`Sequence[Example]`): Part of its selection split.
        dense (`Evaluation`): The dense model's evaluation of the same examples.
    """

    task: str
    examples: Sequence[Example]
    dense: Evaluation

    @property
    def fingerprint(self) -> str:
        """Hash of what the scores depend on beside the model."""
        return content_key(examples=self.dense.fingerprint, metric=self.dense.metric, score=self.dense.score)


@dataclass(frozen=True, kw_only=True)
class SelectionMonitor:
    """Scores a model while it is healed, and compares it with the dense one.

    Args:
        parts (`Sequence[Monitored]`): What is monitored of each task.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        batch_size (`int`): Rows per forward pass.
    """

    parts: Sequence[Monitored]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    @property
    def fingerprint(self) -> str:
        """Hash of what the scores depend on beside the model."""
        own = [part.fingerprint for part in self.parts]
        return own[0] if len(own) == 1 else content_key(parts=own)

    @property
    def count(self) -> int:
        """Number of examples monitored, over all tasks."""
        return sum(part.dense.count for part in self.parts)

    def __call__(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the score and, but for written answers, the divergence from the dense model.

        Of several tasks `"score"` is the lowest difference to the dense model's, `"kl"` the largest divergence, and
        each task's own figures are under `"tasks"`.
        """
        scores: dict[str, dict[str, float]] = {}
        differences: list[float] = []
        for part in self.parts:
            found = evaluate(
                model, part.examples, self.tokenizer, metric=part.dense.metric, batch_size=self.batch_size,
                progress=False,
            )  # fmt: skip
            against = compare(part.dense, found)
            scores[part.task] = {"score": found.score, **({} if against.kl is None else {"kl": against.kl})}
            differences.append(against.mean)
        if len(scores) == 1:
            return dict(*scores.values())
        divergences = [own["kl"] for own in scores.values() if "kl" in own]
        worst = {"score": min(differences), **({"kl": max(divergences)} if divergences else {})}
        return {**worst, "tasks": scores}
