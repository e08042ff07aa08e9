"""What healing trains on: the dense model's predictions on calibration and unlabelled examples and crossed prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve.config.heal import HealConfig
from optimum_sieve.evaluation.on_policy import answer_unlabelled
from optimum_sieve.evaluation.teacher import Lesson, teach
from optimum_sieve.tasks.data import SPLITS, UNLABELLED

from .crossing import crossed_examples


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.tasks import Example


def heal_config(run: Run) -> HealConfig:
    """Return the healing settings of a run that heals."""
    assert isinstance(run.config.heal, HealConfig)
    return run.config.heal


def make_lessons(run: Run) -> list[Lesson]:
    """Evaluate the dense model, which the run must hold now, on calibration and unlabelled examples of every task."""
    return [lesson for task in run.tasks for lesson in _lessons(run, task)]


def training_examples(run: Run, lessons: Sequence[Lesson]) -> dict[str, int]:
    """Return the numbers of calibration and unlabelled examples, and of crossed prompts, for the report."""
    given = sum(len(task.calibration) + len(task.unlabelled) for task in run.tasks)
    return {"examples": given, "crossed_prompts": sum(len(lesson.examples) for lesson in lessons) - given}


def _lessons(run: Run, task: TaskRun) -> list[Lesson]:
    """Return the lesson of a task's calibration examples, and that of its unlabelled examples and crossed prompts."""
    crossed = _crossed(run, task)
    count = len(task.calibration) + len(task.unlabelled) + len(crossed)
    lessons = [_lesson(run, task.calibration, task.weight * len(task.calibration) / count, gold=task.labelled)]
    examples = task.unlabelled
    # Its answers decide on what is matched, except over candidates.
    if examples and (not examples[0].candidates or heal_config(run).loss != "candidates"):
        examples = answer_unlabelled(run, task)
    examples = [*examples, *crossed]
    if examples:
        lessons.append(_lesson(run, examples, task.weight * len(examples) / count, gold=False))
    return lessons


def _crossed(run: Run, task: TaskRun) -> list[Example]:
    """Cross the prompts of a task's calibration examples, if the loss needs no answers to them."""
    config = heal_config(run)
    if config.loss != "candidates":
        return []
    # No prompt of another split may be trained on.
    taken = {example.prompt for split in (*SPLITS, UNLABELLED) for example in task.examples(split)}
    return crossed_examples(task.calibration, config.crossed_prompts, seed=run.config.seed, taken=taken)


def _lesson(run: Run, examples: Sequence[Example], weight: float, *, gold: bool) -> Lesson:
    teacher = teach(
        run.model,
        examples,
        run.tokenizer,
        loss=heal_config(run).loss,
        prompt_sites=heal_config(run).prompt_sites,
        seed=run.config.seed,
        batch_size=run.config.batch_size,
        work=run.work,
        model_key=run.model_key,
        progress=run.progress,
    )
    return Lesson(teacher=teacher, examples=examples, weight=weight, gold=gold)
