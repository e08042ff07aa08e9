"""The dense model of a job, tuned where the job says so, with its scores; and the setup of a run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bench import MODEL_NAME, choose_source, load_model, model_fingerprint, rescore

from optimum_sieve import Evaluation, evaluate

from .cells import base_name, content_key
from .methods import TOLERANCES
from .tuning import tuned_model


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from optimum_sieve import Task
    from optimum_sieve.tasks import Example

    from .cells import Cache
    from .methods import Preset
    from .suite import Job, Places


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Model, rows and caches of a run of the benchmark.

    Args:
        preset (`Preset`): What is measured.
        model (`str`, *optional*): Hub id or directory. `None`: the demo's model.
        dtype (`str`): Dtype of the model.
        places (`Places`): Directories of rows, and of weights and moments.
        figures (`Cache`): The measured figures.
        batch_size (`int`): Rows per forward pass. It changes figures by rounding alone, so no key contains it.
    """

    preset: Preset
    model: str | None
    dtype: str
    places: Places
    figures: Cache
    batch_size: int = 16

    @property
    def model_name(self) -> str:
        """Name of the model in the table."""
        return f"{MODEL_NAME if self.model is None else self.model} in {self.dtype}"

    def load(self) -> tuple[Any, Any]:
        """Load model and tokenizer."""
        path, _, gguf_file = choose_source(self.model, "")
        return load_model(path, dtype=self.dtype, gguf_file=gguf_file)[:2]


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense model with the task that it is pruned for, and its evaluations on the sibling data by name.

    `score` maps a model and examples to an `Evaluation` by the task's metric; `batch_size` is in rows per forward pass.
    """

    model: Any
    tokenizer: Any
    task: Task
    siblings: dict[str, Sequence[Example]]
    evaluations: dict[str, Evaluation]
    figures: dict[str, Any]
    score: Callable[[Any, Sequence[Example]], Evaluation]
    batch_size: int


def load_dense(job: Job, setup: Setup) -> Dense:
    """Load the dense model of a job, tuned if the job says so, and score it, or read both from the cache.

    Raises:
        FileNotFoundError: If the job's rows are missing.
    """
    preset = setup.preset
    task = setup.places.read(job.rows, preset.splits(job.name))
    sibling_tasks = {name: setup.places.read(rows, preset.sibling(job.name)) for name, rows in job.siblings.items()}
    model, tokenizer = setup.load()
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
    name = base_name(job, preset, setup.model_name)
    figures = setup.figures.read(name, fingerprint)
    evaluations = score_siblings(scored, siblings, setup.places.cache / name, again=figures is None)
    if figures is None:
        examples = task.examples("test", tokenizer)
        own = scored(examples)
        figures = {
            "fingerprint": fingerprint,
            "splits": task.splits,
            "tuned": tuned,
            "test": own.to_dict(),
            "also": {metric: scored_by(own, metric, examples) for metric in job.also},
            "clear": is_clear(own),
            "siblings": {each: found.to_dict() for each, found in evaluations.items()},
        }
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
    siblings: dict[str, Sequence[Example]],
    directory: Path,
    *,
    again: bool,
) -> dict[str, Evaluation]:
    """Return the evaluations of the sibling data, read from `directory` unless they must be scored again."""
    evaluations = {}
    for number, (name, examples) in enumerate(siblings.items()):
        path = directory / f"sibling-{number}.safetensors"
        if again or not path.exists():
            directory.mkdir(parents=True, exist_ok=True)
            scored(examples).save(path)
        evaluations[name] = Evaluation.load(path)
    return evaluations


def is_clear(dense: Evaluation) -> bool:
    """Tell whether a score is clearly above that of the most frequent answer.

    Two standard errors below the score must still exceed it by more than the largest tolerance, so that no model within
    a tolerance can have unlearned the task.
    """
    return dense.score - 2 * dense.standard_error > dense.majority_score + max(TOLERANCES)


def scored_by(found: Evaluation, metric: str, examples: Sequence[Example]) -> dict[str, Any]:
    """Return the score of the same predictions by another metric, as the table shows it."""
    scored = rescore(found, metric, examples)
    return {"score": scored.score, "standard_error": scored.standard_error}
