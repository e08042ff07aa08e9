"""The dense model of a task: as it is or tuned for it, with its scores, and whether there is anything to lose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from optimum_sieve import Evaluation, evaluate
from optimum_sieve.backbone.fingerprint import model_fingerprint
from optimum_sieve.run.workdir import content_key
from optimum_sieve.tasks.metrics import CLASS_METRICS, score_classes
from optimum_sieve.tasks.text_metrics import score_texts

from .cells import base_name
from .methods import TOLERANCES
from .tuning import tuned_model


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from optimum_sieve import Task
    from optimum_sieve.tasks import Example
    from optimum_sieve.tasks.metrics import Scored

    from .setup import Setup
    from .suite import Job


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense model with the task it is pruned for.

    Args:
        model (`PreTrainedModel`): The model, which stays as it is.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        task (`Task`): The task.
        siblings (`dict[str, list[Example]]`): Examples of the sibling data by name.
        evaluations (`dict[str, Evaluation]`): The model's on each of them.
        figures (`dict[str, Any]`): What the table shows of it.
        score (`Callable`): Maps a model and examples to an `Evaluation` by the task's metric.
        batch_size (`int`): Rows per forward pass.
    """

    model: Any
    tokenizer: Any
    task: Task
    siblings: dict[str, list[Example]]
    evaluations: dict[str, Evaluation]
    figures: dict[str, Any]
    score: Callable[[Any, Sequence[Example]], Evaluation]
    batch_size: int


def load_dense(job: Job, setup: Setup) -> Dense:
    """Load the dense model of a job, tuned if the job says so, and score it, or take both from the cache.

    Raises:
        FileNotFoundError: If the job's rows are not there.
    """
    preset = setup.preset
    task = setup.places.read(job.rows, preset.splits(job.name))
    sibling_tasks = {name: setup.places.read(rows, preset.sibling(job.name)) for name, rows in job.siblings.items()}
    model, tokenizer = setup.source.load()
    tuned = None
    if job.tuning is not None:
        model, tuned = tuned_model(job, job.tuning, model, tokenizer, setup)
    tasks = [each.fingerprint() for each in (task, *sibling_tasks.values())]
    fingerprint = content_key(model=model_fingerprint(model), tasks=tasks)
    siblings = {name: each.examples("test", tokenizer) for name, each in sibling_tasks.items()}
    score: Callable[[Any, Sequence[Example]], Evaluation] = partial(
        evaluate, tokenizer=tokenizer, metric=task.metric, batch_size=setup.batch_size, progress=False
    )
    scored = partial(score, model)
    name = base_name(job, preset, setup.source.name)
    figures = setup.figures.read(name, fingerprint)
    evaluations = score_siblings(scored, siblings, setup.places.cache / name, again=figures is None)
    if figures is None:
        examples = task.examples("test", tokenizer)
        figures = {"fingerprint": fingerprint, "splits": task.splits, "tuned": tuned}
        figures |= own_figures(job, scored(examples), examples)
        figures["siblings"] = {each: found.to_dict() for each, found in evaluations.items()}
        setup.figures.write(name, figures)
    return Dense(
        model=model,
        tokenizer=tokenizer,
        task=task,
        siblings=siblings,
        evaluations=evaluations,
        figures=figures,
        score=score,
        batch_size=setup.batch_size,
    )


def score_siblings(
    scored: Callable[[Sequence[Example]], Evaluation],
    siblings: dict[str, list[Example]],
    directory: Path,
    *,
    again: bool,
) -> dict[str, Evaluation]:
    """Return the evaluations of the sibling data, kept in `directory` unless they must be scored again."""
    evaluations = {}
    for number, (name, examples) in enumerate(siblings.items()):
        path = directory / f"sibling-{number}.safetensors"
        if again or not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            scored(examples).save(path)
        evaluations[name] = Evaluation.load(path)
    return evaluations


def own_figures(job: Job, own: Evaluation, examples: Sequence[Example]) -> dict[str, Any]:
    """Return what the table shows of the test split."""
    return {
        "test": own.to_dict(),
        "also": {metric: scored_by(own, metric, examples) for metric in job.also},
        "clear": is_clear(own),
    }


def is_clear(dense: Evaluation) -> bool:
    """Tell whether a score is clearly above that of the most frequent answer.

    With two standard errors taken off it must still be above by more than the largest tolerance, so that no model
    within a tolerance can have unlearned the task.
    """
    return dense.score - 2 * dense.standard_error > dense.majority_score + max(TOLERANCES)


def rescore(found: Evaluation, metric: str, examples: Sequence[Example]) -> Scored:
    """Score the same predictions by another metric."""
    if metric in CLASS_METRICS:
        return score_classes(metric, found.predictions, found.targets)
    return score_texts(metric, found.texts, [example.accepted for example in examples])


def scored_by(found: Evaluation, metric: str, examples: Sequence[Example]) -> dict[str, Any]:
    """Return what the table shows of the same predictions by another metric."""
    scored = rescore(found, metric, examples)
    return {"score": scored.score, "standard_error": scored.standard_error}
