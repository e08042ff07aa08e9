"""The reduced vocabulary as a stage of a run."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from optimum_sieve.run.workdir import content_key


if TYPE_CHECKING:
    from collections.abc import Iterator

    from optimum_sieve.run.context import Run, TaskRun


def reduce_vocabulary(run: Run) -> Run:
    """Leave out the tokens that no task needs, where the settings ask for it; return the setting from then on.

    Where the selection splits decide how far to prune, their tokens are not kept for their sake: their texts are cut as
    those will be that nobody has seen, and what that costs counts against the tolerance.
    """
    config = run.config
    if config.vocabulary == "whole":
        return run

    from optimum_sieve.vocabulary import task_vocabulary

    splits = [[*task.calibration, *(task.selection if config.tolerance is None else ())] for task in run.tasks]
    examples = [example for own in splits for example in own]
    vocabulary = task_vocabulary(run.model, run.tokenizer, examples, size=config.vocabulary_size)
    vocabulary.apply()

    def reduced(task: TaskRun) -> TaskRun:
        return replace(task, fingerprint=content_key(run=task.fingerprint, vocabulary=vocabulary.fingerprint))

    return replace(
        run,
        tokenizer=vocabulary.tokenizer,
        tasks=tuple(reduced(task) for task in run.tasks),
        vocabulary=vocabulary,
        given=run,
    )


def restore_vocabulary(run: Run) -> None:
    """Give the model back what `reduce_vocabulary` left out."""
    if run.vocabulary is not None:
        run.vocabulary.undo()


@contextmanager
def reduced_vocabulary(run: Run) -> Iterator[Run]:
    """Do as `reduce_vocabulary` inside the context; the model has all its tokens again afterwards."""
    run = reduce_vocabulary(run)
    try:
        yield run
    finally:
        restore_vocabulary(run)
