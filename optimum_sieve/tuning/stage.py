"""Tuning as a stage of a run: the model before and after it, and how to undo it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from optimum_sieve.evaluation.comparison import compare
from optimum_sieve.evaluation.stage import compare_tuned, score_dense, score_reference, score_test_dense
from optimum_sieve.run import distributed
from optimum_sieve.run.workdir import content_key

from .loop import train, tune_config


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.training.adapters import Adapters


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a tuned run knows of the dense model as it came.

    Args:
        dense (`Sequence[Evaluation]`): Its evaluation on the test split of every task.
        report (`dict[str, Any]`): Figures of the training, and of both models on the selection splits.
        adapters (`Adapters`): The merged adapters, which restore its weights.
    """

    dense: Sequence[Evaluation]
    report: dict[str, Any]
    adapters: Adapters


def tune_dense(run: Run) -> Run:
    """Tune the dense model on the gold answers, in place, if the settings ask for it; return the run that holds it.

    The tuned model is the dense model of every stage that follows: they prune it and heal against it. The model as it
    came is scored first, and stays as it is if the tuned one is worse on the selection split of a task, or after an
    error. The `reference` of the run is the model that its settings name.

    Raises:
        ValueError: If the loss or its gradient is not finite.
    """
    if run.config.tune is None:
        return run
    dense = score_test_dense(run)
    with run.timed("tuning"):
        before = score_reference(run)
        adapters, training, key = train(run)
        report = {"rank": tune_config(run).rank, **training.to_dict()}
        tuning = Tuning(dense=dense, report=report, adapters=adapters)
        tuned = replace(run, model_key=content_key(model=run.model_key, tuned=key), tuning=tuning, reference=before)
        try:
            adapters.merge(keep=True)
            pairs = [_both(tuned, *each) for each in zip(run.tasks, before, strict=True)]
            tuning.report["selection"] = _compared(run.tasks, pairs)
        except BaseException:
            restore_untuned(tuned)
            raise
    if any(row["mean"] < 0 for row in tuning.report["selection"]):
        restore_untuned(tuned)
        return run
    return tuned if run.config.reference == "dense" else replace(tuned, reference=tuple(after for _, after in pairs))


def restore_untuned(run: Run) -> None:
    """Restore the weights that `tune_dense` changed."""
    if run.tuning is not None:
        run.tuning.adapters.undo()


def _both(run: Run, task: TaskRun, before: Evaluation) -> tuple[Evaluation, Evaluation]:
    """Return evaluations of the model before tuning and after it on examples of the selection split."""
    if run.config.reference == "tuned":
        # The sizes will be compared with it on all of them.
        return before, score_dense(run, task, "selection")
    return compare_tuned(run, task, before)


def _compared(tasks: Sequence[TaskRun], pairs: Sequence[tuple[Evaluation, Evaluation]]) -> list[dict[str, Any]]:
    """Compare the tuned model with the one before on the selection split of every task; warn of a loss."""
    rows = []
    for task, (dense, tuned) in zip(tasks, pairs, strict=True):
        # Processes round differently, and all must go on with the same model.
        comparison = distributed.agree(compare(dense, tuned))
        if comparison.mean < 0:
            logger.warning(
                "Tuning lowers the score on the selection split of %r from %.4f to %.4f, so the model is pruned as it "
                "came. Lower `tune.steps` or `tune.learning_rate`, or add rows to the calibration split.",
                task.name, dense.score, tuned.score,
            )  # fmt: skip
        rows.append({"task": task.name, "dense": dense.score, "tuned": tuned.score, **comparison.to_dict()})
    return rows
