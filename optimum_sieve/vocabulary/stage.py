"""The reduced vocabulary as a stage of a run.

With a tolerance, the model without the other tokens is scored first, on texts that did not decide which tokens stay.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optimum_sieve.allocation.tolerance import ToleranceError
from optimum_sieve.evaluation.comparison import compare
from optimum_sieve.evaluation.stage import score, score_dense
from optimum_sieve.run.workdir import content_key
from optimum_sieve.tasks.data import INPUTS


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Example

    from .vocabulary import TaskVocabulary


logger = logging.getLogger(__name__)

# Part of the tolerance that removed tokens may cost. The other part is for the pruning.
TOLERANCE_SHARE = 0.5
# Larger parts of the whole vocabulary are not worth the loss.
_LARGEST_PART = 0.9


def reduce_vocabulary(run: Run) -> Run:
    """Remove the tokens that no task needs if the settings ask for it; return the run with the reduced vocabulary.

    With a `tolerance`, tokens that only the selection splits need are removed too: those texts are then tokenized like
    unseen ones. The loss in accuracy that they show decides on the size, and counts against the tolerance.

    Raises:
        ToleranceError: If removing tokens alone loses too much.
    """
    config = run.config
    if config.vocabulary == "whole":
        return run

    from .vocabulary import task_vocabulary

    splits = INPUTS if config.tolerance is not None else (*INPUTS, "selection")
    examples = [example for task in run.tasks for split in splits for example in task.examples(split)]
    with run.timed("vocabulary"):
        if config.tolerance is not None:
            return grow_vocabulary(run, examples)
        return use_vocabulary(run, task_vocabulary(run.model, run.tokenizer, examples, size=config.vocabulary_size))


def use_vocabulary(run: Run, vocabulary: TaskVocabulary) -> Run:
    """Remove all other tokens from the model; return the run with this vocabulary."""
    vocabulary.apply()
    key = content_key(model=run.model_key, vocabulary=vocabulary.fingerprint)
    tokenizer = vocabulary.tokenizer
    return replace(run, tokenizer=tokenizer, model_key=key, vocabulary=vocabulary, before_reduction=run)


def restore_vocabulary(run: Run) -> None:
    """Restore the tokens that `reduce_vocabulary` removed from the model."""
    if run.vocabulary is not None:
        run.vocabulary.undo()


@contextmanager
def reduced_vocabulary(run: Run) -> Iterator[Run]:
    """Reduce the vocabulary inside the context; the model has all its tokens again afterwards."""
    run = reduce_vocabulary(run)
    try:
        yield run
    finally:
        restore_vocabulary(run)


def grow_vocabulary(run: Run, examples: Sequence[Example]) -> Run:
    """Return the run with a vocabulary for `examples` that costs at most half of the tolerance.

    The selection splits have words that `examples` lack, as later texts will. The model is scored on them with the
    vocabulary and with all tokens. While the lower bound of the paired difference is below `-tolerance / 2` on a task,
    the vocabulary grows.

    Args:
        run (`Run`): The run with all tokens.
        examples (`Sequence[Example]`): The examples whose tokens are kept.

    Raises:
        ToleranceError: If no vocabulary much smaller than the whole one is within half of the tolerance. The model then
            has all its tokens.
    """
    from .vocabulary import task_vocabulary

    config, size = run.config, run.config.vocabulary_size
    dense = [score_dense(run, task, "selection") for task in run.tasks]
    trials: list[dict[str, Any]] = []
    while True:
        vocabulary = task_vocabulary(run.model, run.tokenizer, examples, size=size)
        reduced = use_vocabulary(run, vocabulary)
        try:
            trial = {"tokens": vocabulary.rows.size, **_worst(reduced, dense)}
        except BaseException:
            vocabulary.undo()
            raise
        trials.append(trial)
        logger.info(
            "%(tokens)d tokens: score difference %(mean)+.4f +- %(standard_error).4f, lower bound %(lower_bound)+.4f.",
            trial,
        )
        if trial["lower_bound"] >= -TOLERANCE_SHARE * (config.tolerance or 0.0):
            return replace(reduced, vocabulary_trials=tuple(trials))
        vocabulary.undo()
        size = _next_size(trial["tokens"], vocabulary.rows.size_before)
        if size is None or (len(trials) > 1 and trial["tokens"] == trials[-2]["tokens"]):
            raise ToleranceError(_failure(trial, vocabulary.rows.size_before, config.tolerance))


def _next_size(size: int, whole: int) -> int | None:
    """Return the next size to try: twice as many tokens, but at most half of the missing ones; `None` near the end."""
    following = min(2 * size, (size + whole) // 2)
    return following if following <= _LARGEST_PART * whole else None


def vocabulary_part(run: Run) -> str:
    """Say how much of a loss the removed tokens cause, for an error; empty with the whole vocabulary."""
    if not run.vocabulary_trials:
        return ""
    trial = run.vocabulary_trials[-1]
    return (
        f" vocabulary='task' alone loses {-trial['mean']:.4f} +- {trial['standard_error']:.4f} with "
        f"{trial['tokens']:,} tokens; vocabulary='whole' loses nothing."
    )


def _worst(run: Run, dense: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the comparison with the dense model on the task that loses most, named if there are several."""
    found = {
        task.name: compare(whole, score(run, task, "selection", label="model with the task's vocabulary"))
        for task, whole in zip(run.tasks, dense, strict=True)
    }
    bounds = {name: comparison.lower_bound(run.config.confidence) for name, comparison in found.items()}
    worst = min(bounds, key=bounds.__getitem__)
    named = {"task": worst} if len(found) > 1 else {}
    return {**named, "lower_bound": bounds[worst], **found[worst].to_dict()}


def _failure(trial: dict[str, Any], size: int, tolerance: float | None) -> str:
    where = f" on {trial['task']!r}" if "task" in trial else ""
    return (
        f"`vocabulary='task'` must lose at most half of tolerance={tolerance} before any pruning, got "
        f"{-trial['mean']:.4f} +- {trial['standard_error']:.4f}{where} with {trial['tokens']:,} of {size:,} tokens. "
        "Add calibration texts, use more selection examples (a smaller standard error), or set vocabulary='whole'."
    )
