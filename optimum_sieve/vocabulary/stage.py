"""The reduced vocabulary as a stage of a run."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from optimum_sieve.run.workdir import content_key


if TYPE_CHECKING:
    from collections.abc import Iterator

    from optimum_sieve.run.context import Run

    from .vocabulary import TaskVocabulary


def reduce_vocabulary(run: Run) -> Run:
    """Remove the tokens that no task needs if the settings ask for it; return the run with the reduced vocabulary.

    With a `tolerance`, tokens that only the selection splits need are removed too: those texts are then tokenized like
    unseen ones, and the loss in accuracy counts against the tolerance.
    """
    config = run.config
    if config.vocabulary == "whole":
        return run

    from optimum_sieve.vocabulary import task_vocabulary

    splits = ("calibration",) if config.tolerance is not None else ("calibration", "selection")
    examples = [example for task in run.tasks for split in splits for example in task.examples(split)]
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
