"""The reduced vocabulary as a stage of a run."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from optimum_sieve.run.workdir import content_key
from optimum_sieve.vocabulary import task_vocabulary


if TYPE_CHECKING:
    from collections.abc import Iterator

    from optimum_sieve.run.context import Setting, TaskSetting


def reduce_vocabulary(setting: Setting) -> Setting:
    """Leave out the tokens that no task needs, where the settings ask for it; return the setting from then on.

    Where the selection splits decide how far to prune, their tokens are not kept for their sake: their texts are cut as
    those will be that nobody has seen, and what that costs counts against the tolerance.
    """
    config = setting.config
    if config.vocabulary == "whole":
        return setting
    splits = [[*task.calibration, *(task.selection if config.tolerance is None else ())] for task in setting.tasks]
    examples = [example for own in splits for example in own]
    vocabulary = task_vocabulary(setting.model, setting.tokenizer, examples, size=config.vocabulary_size)
    vocabulary.apply()

    def reduced(task: TaskSetting) -> TaskSetting:
        return replace(task, fingerprint=content_key(run=task.fingerprint, vocabulary=vocabulary.fingerprint))

    return replace(
        setting,
        tokenizer=vocabulary.tokenizer,
        tasks=tuple(reduced(task) for task in setting.tasks),
        vocabulary=vocabulary,
        given=setting,
    )


def restore_vocabulary(setting: Setting) -> None:
    """Give the model back what `reduce_vocabulary` left out."""
    if setting.vocabulary is not None:
        setting.vocabulary.undo()


@contextmanager
def reduced_vocabulary(setting: Setting) -> Iterator[Setting]:
    """Do as `reduce_vocabulary` inside the context; the model has all its tokens again afterwards."""
    setting = reduce_vocabulary(setting)
    try:
        yield setting
    finally:
        restore_vocabulary(setting)
