"""What healing trains on: the dense model's predictions on calibration and unlabelled examples and crossed prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.config.heal import HealConfig
from optimum_sieve.evaluation.encoding import encode_examples
from optimum_sieve.evaluation.on_policy import answer_unlabelled
from optimum_sieve.evaluation.teacher import CandidateTeacher, Lesson, teach
from optimum_sieve.run import distributed
from optimum_sieve.run.workdir import content_key
from optimum_sieve.tasks.parts import template_marks
from optimum_sieve.training.negatives import COPIES, drawn_copies, has_many_candidates

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
    """Return what the dense model, which the run must hold now, predicts on the examples that healing trains on.

    These are each task's calibration and unlabelled examples and its crossed prompts.
    """
    return [lesson for task in run.tasks for lesson in _lessons(run, task)]


def training_examples(lessons: Sequence[Lesson]) -> dict[str, int]:
    """Return the numbers of calibration and unlabelled examples, and of crossed prompts, for the report."""
    crossed = sum(lesson.crossed for lesson in lessons)
    return {
        "examples": sum(len(lesson.examples) // lesson.copies for lesson in lessons) - crossed,
        "crossed_prompts": crossed,
    }


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
        weight = task.weight * len(examples) / count
        lessons.append(replace(_lesson(run, examples, weight, gold=False), crossed=len(crossed)))
    return lessons


def _crossed(run: Run, task: TaskRun) -> list[Example]:
    """Cross the prompts of a task's calibration examples, if it has labels and the loss needs no gold answer.

    Where a step sees some of many candidates, each prompt is drawn with several parts of them and counts as often.
    """
    config = heal_config(run)
    # The choices of another question are no answers to this one.
    if task.kind != "labels" or config.loss != "candidates":
        return []
    inputs = input_format(run.model)
    many = has_many_candidates(task.calibration, config.max_candidates, run.tokenizer, inputs)
    count = config.crossed_prompts // (COPIES if many else 1)
    # No prompt of another split may be trained on.
    crossed = crossed_examples(
        task.calibration, count, seed=run.config.seed, taken=task.prompts, marks=template_marks(run.tokenizer)
    )
    if not crossed:
        return []
    # As many characters may have more tokens, for which neither the context nor the planned memory may be enough.
    known = encode_examples(task.calibration, run.tokenizer, True, inputs)
    longest = max(row.length for row in known)
    rows = encode_examples(crossed, run.tokenizer, True, inputs)
    return [example for example, row in zip(crossed, rows, strict=True) if row.length <= longest]


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
    return _with_few_candidates(run, Lesson(teacher=teacher, examples=examples, weight=weight, gold=gold))


def _with_few_candidates(run: Run, lesson: Lesson) -> Lesson:
    """Return a lesson over some of the candidates of each example, if there are many."""
    most, teacher = heal_config(run).max_candidates, lesson.teacher
    if not isinstance(teacher, CandidateTeacher):
        return lesson
    if not has_many_candidates(lesson.examples, most, run.tokenizer, input_format(run.model)):
        return lesson
    # Processes round differently, and all must read the same texts.
    log_probs = distributed.agree(teacher.log_probs.double().numpy())
    examples, chosen = drawn_copies(lesson.examples, most, COPIES, seed=run.config.seed, log_probs=log_probs)
    drawn = among(teacher, chosen, [example.target or 0 for example in examples])
    return replace(lesson, examples=examples, teacher=drawn, copies=COPIES)


def among(teacher: CandidateTeacher, chosen: Sequence[Sequence[int]], targets: Sequence[int]) -> CandidateTeacher:
    """Return the distributions over some of the candidates, given that one of these is the answer.

    Args:
        teacher (`CandidateTeacher`): The distributions over all of them.
        chosen (`Sequence[Sequence[int]]`): Indices of the candidates: those of all examples, once or several times.
        targets (`Sequence[int]`): Index of the gold one among them.
    """
    log_probs = torch.full((len(chosen), max(map(len, chosen))), float("-inf"))
    for number, candidates in enumerate(chosen):
        log_probs[number, : len(candidates)] = teacher.log_probs[number % len(teacher.log_probs), list(candidates)]
    fingerprint = content_key(all=teacher.fingerprint, chosen=[list(candidates) for candidates in chosen])
    return CandidateTeacher(fingerprint, torch.tensor(targets), log_probs.log_softmax(dim=-1))
