"""What a pruning run returns, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum_sieve.backbone.kinds import model_kind
from optimum_sieve.backbone.sizes import shard_bytes
from optimum_sieve.evaluation.comparison import compare
from optimum_sieve.modeling.conversion import sieve_model
from optimum_sieve.modeling.modeling_sieve import read_rank_pattern
from optimum_sieve.run import distributed
from optimum_sieve.run.files import check_output, whole_directory
from optimum_sieve.surgery.apply import largest_coefficient

from .card import PIPELINE_TAGS, base_license, build_card
from .report import REPORT_NAME, build_report, task_block, task_blocks, write_report


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.run.context import TaskRun


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What was scored of one task.

    Args:
        task (`str`): Name of the task.
        dense (`Evaluation`): The dense model's evaluation on the test split.
        pruned (`Evaluation`): The pruned model's.
        references (`str`, *optional*): Whose answers the scores are against, where the data has none.
    """

    task: str
    dense: Evaluation
    pruned: Evaluation
    references: str | None = None

    @classmethod
    def of(cls, task: TaskRun, dense: Evaluation, pruned: Evaluation) -> TaskScores:
        """Name the task of two evaluations."""
        return cls(task=task.name, dense=dense, pruned=pruned, references=None if task.labelled else "dense model")

    def block(self) -> dict[str, Any]:
        """Return what the report says of the task."""
        comparison = compare(self.dense, self.pruned)
        return task_block(self.task, self.dense, self.pruned, comparison, references=self.references)


@dataclass(frozen=True, kw_only=True)
class SieveResult:
    """What a pruning run returns.

    Args:
        model (`PreTrainedModel`): The pruned model, of model type `sieve`.
        rank_pattern (`dict[str, dict]`): Module name, relative to the base model -> `rank`, `storage`, `bias`.
        report (`dict[str, Any]`): The content of `sieve_report.json`.
        trials (`list[dict]`): What the search tried, with its figures on the selection split.
        scores (`tuple[TaskScores, ...]`): What each example of the test split got, of each task.
    """

    model: PreTrainedModel
    rank_pattern: dict[str, dict[str, Any]]
    report: dict[str, Any]
    trials: list[dict[str, Any]]
    scores: tuple[TaskScores, ...]


def make_result(
    model: PreTrainedModel,
    *,
    scores: Sequence[TaskScores],
    sizes: tuple[dict[str, int], dict[str, int]],
    trials: list[dict[str, Any]],
    settings: dict[str, Any],
    seconds: dict[str, float],
    loading: dict[str, str] | None,
    base_model: str | None,
    base_revision: str | None,
    healing: dict[str, Any] | None = None,
    vocabulary: dict[str, int] | None = None,
    latency: dict[str, float] | None = None,
) -> SieveResult:
    """Turn a factorized model, in place, into one of model type `sieve`, and report on it.

    Args:
        model (`PreTrainedModel`): The factorized model.
        scores (`Sequence[TaskScores]`): The dense and the pruned model's, of each task.
        sizes (`tuple[dict, dict]`): Before and after, see `measure_sizes`.
        trials (`list[dict]`): What the search tried.
        settings (`dict[str, Any]`): `SieveConfig.to_dict()` of the run.
        seconds (`dict[str, float]`): Wall-clock time of each stage.
        loading (`dict[str, str]`, *optional*): Options with which the dense model was loaded.
        base_model (`str`, *optional*): Public name of the dense model.
        base_revision (`str`, *optional*): Its commit on the Hub.
        healing (`dict[str, Any]`, *optional*): What healing did.
        vocabulary (`dict[str, int]`, *optional*): Rows of the embeddings before and after, where they are fewer.
        latency (`dict[str, float]`, *optional*): Seconds of the targets for one row, where they had a target.
    """
    named = dict(zip(("before", "after"), sizes, strict=True))
    report = build_report(
        [own.block() for own in scores],
        parameters={f"{part}_{when}": own[part] for part in ("targets", "model") for when, own in named.items()},
        num_bytes={when: own["bytes"] for when, own in named.items()},
        seconds={stage: round(value, 3) for stage, value in seconds.items()},
        settings=settings,
        largest_coefficient=largest_coefficient(model),
        loading=loading,
        healing=healing,
        vocabulary=vocabulary,
        latency=latency,
    )
    model = sieve_model(
        model,
        base_model=base_model,
        base_revision=base_revision,
        settings=settings,
        results=_results(report),
        vocabulary=vocabulary,
    )
    return SieveResult(
        model=model,
        rank_pattern=read_rank_pattern(model),
        report=report,
        trials=trials,
        scores=tuple(scores),
    )


def _results(report: dict[str, Any]) -> dict[str, Any]:
    """Return what the configuration says of the scores: of one task itself, of several a list under `"tasks"`."""
    keys = ("task", "split", "metric", "count", "dense", "pruned")
    blocks = [{key: task[key] for key in keys} for task in task_blocks(report)]
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
) -> Path:
    """Write model, tokenizer, model card and report; all of it or, if anything fails, nothing.

    Raises:
        FileExistsError: If `output` holds files and `overwrite` is false.
        OSError: If the disk is full or the directory cannot be written.
    """
    if not distributed.is_first():
        distributed.wait()
        return output
    check_output(output, overwrite, needed_bytes=result.report["bytes"]["after"])
    report = result.report
    limited = report["settings"]["memory_limit"] is not None
    options: dict[str, Any] = {"max_shard_size": shard_bytes(result.model)} if limited else {}
    with whole_directory(output) as partial:
        result.model.save_pretrained(partial, **options)
        tokenizer.save_pretrained(partial)
        report["bytes"]["after"] = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
        write_report(report, partial / REPORT_NAME)
        card = build_card(
            report,
            result.rank_pattern,
            base_model=base_model,
            base_revision=base_revision,
            task_specs=task_specs,
            pipeline_tag=PIPELINE_TAGS[model_kind(result.model)],
            license_id=base_license(base_model),
        )
        card.save(partial / "README.md")
    distributed.wait()
    return output
