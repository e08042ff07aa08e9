"""Score a run's model, and keep the scores in its work directory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optimum_sieve.run import distributed
from optimum_sieve.run.context import Run, TaskRun

from .blockwise import evaluate_by_block
from .labelling import label_by_model
from .scores import Evaluation, evaluate


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.tasks import Example


def score(
    run: Run,
    task: TaskRun,
    examples: Sequence[Example],
    description: str,
    *,
    held: tuple[Mapping[str, FactorBasis], Mapping[str, int | None]] | None = None,
    **key: object,
) -> Evaluation:
    """Score the model as it is now on examples of a task, or take the score from the work directory.

    Args:
        run (`Run`): The run.
        task (`TaskRun`): The task.
        examples (`Sequence[Example]`): Examples of it.
        description (`str`): What is scored on what.
        held (`tuple`, *optional*): Bases and ranks that the model is to have meanwhile, block by block.
        key (`object`): What the score depends on beside the run and the description.
    """
    name = run.key(task=task, description=description, **key)
    if (found := run.work.find("evaluation", name)) is not None:
        return Evaluation.load(found)
    options: dict[str, Any] = {"metric": task.metric, "batch_size": run.config.batch_size}
    options |= {"progress": run.progress, "description": description}
    if run.by_block and examples[0].generation is None:
        bases, ranks = held or ({}, {})
        options |= {"bases": bases, "ranks": ranks, "directory": run.work.path}
        evaluation = evaluate_by_block(run.model, examples, run.tokenizer, **options)
    else:
        evaluation = evaluate(run.model, examples, run.tokenizer, **options)
    path = run.work.file("evaluation", name)
    if path is not None and distributed.is_first():
        evaluation.save(path)
    distributed.wait()
    return evaluation


def score_dense(run: Run, task: TaskRun, examples: Sequence[Example], part: str) -> Evaluation:
    """Score the dense model, which `setting` must hold now, with the vocabulary that it was given with."""
    description = f"dense model on {part}"
    if run.vocabulary is None or run.given is None:
        return score(run, task, examples, description)
    (given,) = (own for own in run.given.tasks if own.name == task.name)
    with run.vocabulary.undone():
        return score(run.given, given, examples, description)


def with_answers(run: Run, *splits: str) -> Run:
    """Return the run with the dense model's likeliest answers for gold in these splits of tasks without labels."""

    def answered(task: TaskRun) -> TaskRun:
        if task.labelled:
            return task
        found: dict[str, Any] = {split: label_examples(run, getattr(task, split)) for split in splits}
        return replace(task, **found)

    return replace(run, tasks=tuple(answered(task) for task in run.tasks))


def label_examples(run: Run, examples: Sequence[Example], seed: int | None = None) -> list[Example]:
    """Return the examples with the model's own answers for gold: the likeliest, or drawn with a seed."""
    size, progress = run.config.batch_size, run.progress
    return label_by_model(run.model, examples, run.tokenizer, batch_size=size, seed=seed, progress=progress)
