"""The result of a pruning run, and its directory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_sieve.backbone.adapters.merging import merged_adapter
from optimum_sieve.backbone.kinds import loaded_kind
from optimum_sieve.backbone.sizes import shard_bytes
from optimum_sieve.backbone.sources import processor_files
from optimum_sieve.evaluation.comparison import compare
from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern
from optimum_sieve.run import distributed
from optimum_sieve.surgery.apply import largest_coefficient

from .card import base_license, build_card, hub_id
from .directory import save_directory
from .page.examples import differing
from .recipe import recipe_files
from .report import DIGEST_KEY, build_report, remove_scores, task_block, task_blocks
from .saved import save_model
from .sections import parts_section
from .table import format_table
from .task_file import public_task, sieve_task_json
from .trials import trial_rows


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.run.context import TaskRun
    from optimum_sieve.tasks import Task


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """Evaluations of one task.

    Args:
        task (`str`): Name of the task.
        dense (`Evaluation`): Evaluation of the dense model on the test split.
        pruned (`Evaluation`): Evaluation of the pruned model on the same examples.
        references (`str`, *optional*): Model whose answers the scores compare with, if the data has none.
        tuned (`Evaluation`, *optional*): Evaluation of the dense model after tuning, if it was tuned.
    """

    task: str
    dense: Evaluation
    pruned: Evaluation
    references: str | None = None
    tuned: Evaluation | None = None

    @classmethod
    def of(cls, task: TaskRun, dense: Evaluation, pruned: Evaluation, untuned: Evaluation | None = None) -> TaskScores:
        """Make the scores of a task from the evaluations of both models and, if `dense` was tuned, of it before."""
        references = None if task.labelled else "dense model"
        if untuned is None:
            return cls(task=task.name, dense=dense, pruned=pruned, references=references)
        return cls(task=task.name, dense=untuned, tuned=dense, pruned=pruned, references=references)

    def block(self) -> dict[str, Any]:
        """Return the section of the report."""
        more: dict[str, Any] = {"references": self.references}
        if self.tuned is not None:
            more |= {"tuned": self.tuned, "to_tuned": compare(self.tuned, self.pruned)}
        return task_block(self.task, self.dense, self.pruned, compare(self.dense, self.pruned), **more)


@dataclass(frozen=True, kw_only=True)
class SieveResult:
    """Result of a pruning run.

    Args:
        model (`PreTrainedModel`): The pruned model, of model type `sieve`.
        rank_pattern (`dict[str, dict]`): Module name, relative to the base model -> `rank`, `storage`, `bias`.
        report (`dict[str, Any]`): Content of `sieve_report.json`.
        trials (`list[dict]`): Candidates of the search with their scores on the selection split.
        scores (`tuple[TaskScores, ...]`): Evaluations of each task on its test split, with a score per example.
    """

    model: PreTrainedModel
    rank_pattern: dict[str, dict[str, Any]]
    report: dict[str, Any]
    trials: list[dict[str, Any]]
    scores: tuple[TaskScores, ...]

    def __str__(self) -> str:
        """Return the scores, differences and sizes as a table."""
        return format_table(self.report)


def make_result(
    model: PreTrainedModel,
    *,
    scores: Sequence[TaskScores],
    sizes: tuple[dict[str, Any], dict[str, Any]],
    trials: list[dict[str, Any]],
    settings: dict[str, Any],
    seconds: dict[str, float],
    loading: dict[str, str] | None,
    base_model: str | None,
    base_revision: str | None,
    tuning: dict[str, Any] | None = None,
    healing: dict[str, Any] | None = None,
    vocabulary: dict[str, int] | None = None,
    latency: dict[str, float] | None = None,
    label_offsets: list[dict[str, Any]] | None = None,
    adapter: dict[str, str] | None = None,
    sections: dict[str, Any] | None = None,
) -> SieveResult:
    """Turn a factorized model into one of model type `sieve`, in place, and build its report.

    Args:
        model (`PreTrainedModel`): The factorized model.
        scores (`Sequence[TaskScores]`): Evaluations of each task.
        sizes (`tuple[dict, dict]`): Sizes before and after, see `measure_sizes`.
        trials (`list[dict]`): Candidates of the search.
        settings (`dict[str, Any]`): `SieveConfig.to_dict()` of the run.
        seconds (`dict[str, float]`): Wall-clock time of each stage.
        loading (`dict[str, str]`, *optional*): Options that loaded the dense model.
        base_model (`str`, *optional*): Public name of the dense model.
        base_revision (`str`, *optional*): Commit of the dense model on the Hub.
        tuning (`dict[str, Any]`, *optional*): Figures of tuning.
        healing (`dict[str, Any]`, *optional*): Result of healing.
        vocabulary (`dict[str, int]`, *optional*): Rows of the embeddings before and after, if the vocabulary was cut.
        latency (`dict[str, float]`, *optional*): Seconds of the targets for one row, if there was a latency target.
        label_offsets (`list[dict]`, *optional*): Offsets that the scores of the pruned model contain.
        adapter (`dict[str, str]`, *optional*): What may be published of the adapter that was merged into `base_model`.
        sections (`dict[str, Any]`, *optional*): Further sections of the report, see `publish.sections`.
    """
    named = dict(zip(("before", "after"), sizes, strict=True))
    report = build_report(
        [task.block() for task in scores],
        parameters={f"{part}_{when}": size[part] for part in ("targets", "model") for when, size in named.items()},
        num_bytes={when: size["bytes"] for when, size in named.items()},
        seconds={stage: round(value, 3) for stage, value in seconds.items()},
        settings=settings,
        largest_coefficient=largest_coefficient(model),
        loading=loading,
        tuning=tuning,
        healing=healing,
        vocabulary=vocabulary,
        latency=latency,
        label_offsets=label_offsets or None,
        sections={
            **(sections or {}),
            "base_model": base_model,
            "adapter": adapter,
            "parts": parts_section(sizes),
            "trials": trial_rows(trials, settings.get("tolerance")) or None,
        },
    )
    model = sieve_model(
        model,
        base_model=base_model,
        base_revision=base_revision,
        settings=settings,
        results=_results(report),
        vocabulary=vocabulary,
        label_offsets=label_offsets,
        adapter=adapter,
    )
    report[DIGEST_KEY] = model.config.sieve["results"][DIGEST_KEY]
    return SieveResult(
        model=model,
        rank_pattern=read_rank_pattern(model),
        report=report,
        trials=trials,
        scores=tuple(scores),
    )


def _results(report: dict[str, Any]) -> dict[str, Any]:
    """Return the scores for the configuration: the block of a single task, or several under `"tasks"`."""
    keys = ("task", "split", "metric", "count", "dense", "tuned", "pruned")
    blocks = [{key: task[key] for key in keys if key in task} for task in task_blocks(report)]
    return blocks[0] if len(blocks) == 1 else {"tasks": blocks}


def save_result(
    result: SieveResult,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    overwrite: bool,
    base_model: str | None,
    base_revision: str | None,
    task_specs: Sequence[dict[str, Any]],
    work_dir: str | Path | None = None,
    tasks: Sequence[Task] = (),
) -> Path:
    """Write model, tokenizer, model card, report and page; all of it or, if anything fails, nothing.

    The page shows the test examples of `tasks` that both models answer differently; without tasks, no text of the data.

    Raises:
        FileExistsError: If `output` holds files and `overwrite` is false, or files that are not of a model.
        ValueError: If `output` is, contains or is inside the dense model or `work_dir`.
        OSError: If the disk is full or the directory cannot be written.
    """
    if distributed.is_first():
        examples = [_differing(*each, tokenizer) for each in zip(result.scores, tasks, strict=True)] if tasks else None
        limited = result.report["settings"].get("memory_limit") is not None
        options: dict[str, Any] = {"max_shard_size": shard_bytes(result.model)} if limited else {}

        adapter = merged_adapter(result.model) or {}
        dense, revision = adapter.get("name", base_model), adapter.get("revision") if adapter else base_revision

        specs = [public_task(spec) for spec in task_specs]

        def write_model(directory: Path) -> None:
            save_model(result.model, directory, **options)
            if DIGEST_KEY not in result.model.config.sieve["results"]:
                remove_scores(result.report)

        save_directory(
            output,
            write_model,
            tokenizer,
            lambda: build_card(
                result.report,
                read_rank_pattern(result.model),
                base_model=base_model,
                base_revision=base_revision,
                task_specs=specs,
                kind=loaded_kind(result.model.config),
                license_id=base_license(base_model),
            ),
            report=result.report,
            files=lambda: {
                **processor_files(result.model, adapter.get("name")),
                **sieve_task_json(specs, result.report),
                **recipe_files(result.report, specs, base_model=hub_id(dense), revision=revision),
            },
            examples=examples,
            overwrite=overwrite,
            needed_bytes=result.report["bytes"]["after"],
            inputs=[("model", base_model), ("model", adapter.get("name")), ("work_dir", work_dir)],
        )
    distributed.wait()
    return output


def _differing(scores: TaskScores, task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    before, name = (scores.dense, "dense") if scores.tuned is None else (scores.tuned, "tuned")
    return differing(task.name, before, scores.pruned, task.examples("test", tokenizer), name=name)
