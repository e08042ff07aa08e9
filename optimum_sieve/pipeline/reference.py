"""The model that a tolerance is measured from: scored, and tuned, before the long stages of a run."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from optimum_sieve.evaluation.stage import score_reference
from optimum_sieve.tuning.stage import tune_dense


if TYPE_CHECKING:
    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.run.context import Run


logger = logging.getLogger(__name__)


def prepare_reference(run: Run) -> Run:
    """Tune the dense model if the settings ask for it; return the run that holds it, with the `reference` it needs.

    The reference is scored as early as possible, and a warning says where it has nothing to lose: before tuning if it
    is the model as it came, else after it.
    """
    if not run.config.compares:
        return tune_dense(run)
    with run.timed("ranks"):
        run = replace(run, reference=score_reference(run))
    if run.config.reference == "dense":
        _warn(run)
        return tune_dense(run)
    run = tune_dense(run)
    _warn(run)
    return run


def _warn(run: Run) -> None:
    for task, evaluation in zip(run.tasks, run.reference, strict=True):
        warn_of_the_majority(task.name, evaluation, "selection")


def warn_of_the_majority(task: str, dense: Evaluation, split: str) -> None:
    """Warn if the dense model is no better on a task than always giving the most frequent answer."""
    if dense.score <= dense.majority_score:
        logger.warning(
            "The dense model scores %.4f on the %s split of %r, always giving the most frequent answer %.4f: there is "
            "nothing to lose, and any size may pass. Improve the prompt, or use another model.",
            dense.score, split, task, dense.majority_score,
        )  # fmt: skip
