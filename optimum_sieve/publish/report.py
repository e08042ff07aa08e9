"""Report of a run: the content of `sieve_report.json`. Does not import torch."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve.metrics.scored import EXAMPLES
from optimum_sieve.run.files import replacing

from .sections import answers_section


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.evaluation.comparison import Comparison
    from optimum_sieve.evaluation.scores import Evaluation

REPORT_NAME = "sieve_report.json"
# That of `modeling.fingerprint`, which imports torch.
DIGEST_KEY = "weights_sha256"
# Key of the form in which the model was exported after it was scored.
EXPORT_KEY = "exported"
# Keys of what holds for the weights of the pruned model alone.
_MEASURED = (
    *("pruned", "paired_difference", "difference_to_tuned", "agreement", "kl", "answers", "healing"),
    *("largest_coefficient", DIGEST_KEY),
)
_VERSIONED = ("optimum-sieve", "torch", "transformers", "optimum", "accelerate", "datasets", "numpy", "safetensors")


def task_block(
    task_name: str,
    dense: Evaluation | None = None,
    pruned: Evaluation | None = None,
    comparison: Comparison | None = None,
    *,
    split: str = "test",
    references: str | None = None,
    tuned: Evaluation | None = None,
    to_tuned: Comparison | None = None,
) -> dict[str, Any]:
    """Build the section of one task; keys of missing arguments are left out.

    Args:
        task_name (`str`): Name of the task.
        dense (`Evaluation`, *optional*): Evaluation of the dense model.
        pruned (`Evaluation`, *optional*): Evaluation of the pruned model, on the same examples.
        comparison (`Comparison`, *optional*): Paired comparison of the two.
        split (`str`): The split that was scored.
        references (`str`, *optional*): Model whose answers the scores compare with, if the data has none.
        tuned (`Evaluation`, *optional*): Evaluation of the tuned dense model, if it was tuned before it was pruned.
        to_tuned (`Comparison`, *optional*): Paired comparison of the pruned model with the tuned one.

    Returns:
        `dict[str, Any]`: Scores in the metric of the task; differences are pruned minus dense, or minus tuned. The
            agreement and the divergence are between the pruned model and the one it was pruned from.

    Raises:
        ValueError: If neither `dense` nor `pruned` is given, or their metrics or numbers of examples differ.
    """
    scored = [evaluation for evaluation in (dense, pruned) if evaluation is not None]
    if not scored:
        raise ValueError("`dense` or `pruned` must be an evaluation, got None for both. Evaluate a model first.")
    if len({(evaluation.metric, evaluation.count) for evaluation in scored}) > 1:
        raise ValueError(
            "`dense` and `pruned` must be evaluations of the same metric on the same examples, got "
            + " and ".join(f"{evaluation.metric} on {evaluation.count}" for evaluation in scored)
            + ". Evaluate both models on one list of examples."
        )
    report = {"task": task_name, "split": split, **_metric_keys(scored)}
    for name, evaluation in (("dense", dense), ("tuned", tuned), ("pruned", pruned)):
        if evaluation is not None:
            report[name] = {
                "score": float(evaluation.score),
                "standard_error": float(evaluation.standard_error),
            }
    for name, compared in (("paired_difference", comparison), ("difference_to_tuned", to_tuned)):
        if compared is not None:
            report[name] = {"mean": float(compared.mean), "standard_error": float(compared.standard_error)}
    closest = to_tuned or comparison
    if closest is not None:
        report |= {"agreement": float(closest.agreement), "kl": closest.kl}
        report["answers"] = answers_section(tuned or dense, pruned)
    report["references"] = references
    return {key: value for key, value in report.items() if value is not None}


def _metric_keys(scored: Sequence[Evaluation]) -> dict[str, Any]:
    """Return what describes the metric in the section of a task."""
    first = scored[0]
    keys = {
        "metric": first.metric,
        "count": first.count,
        "examples_sha256": first.fingerprint,
        "error_method": next((each.error_method for each in scored if each.error_method != EXAMPLES), EXAMPLES),
    }
    # A module of evaluate may be undefined for constant answers.
    if not math.isnan(first.majority_score):
        keys["majority_score"] = float(first.majority_score)
    return keys if first.module is None else keys | {"metric_module": first.module}


def build_report(
    tasks: Sequence[dict[str, Any]],
    parameters: dict[str, int] | None = None,
    num_bytes: dict[str, int] | None = None,
    seconds: dict[str, float] | None = None,
    settings: dict[str, Any] | None = None,
    *,
    largest_coefficient: float | None = None,
    loading: dict[str, str] | None = None,
    tuning: dict[str, Any] | None = None,
    healing: dict[str, Any] | None = None,
    vocabulary: dict[str, Any] | None = None,
    latency: dict[str, float] | None = None,
    label_offsets: list[dict[str, Any]] | None = None,
    sections: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the content of `sieve_report.json` as JSON values; keys of missing arguments are left out.

    Args:
        tasks (`Sequence[dict]`):
            Blocks of [`task_block`]. The keys of a single block are in the report itself, several are its `"tasks"`.
        parameters (`dict[str, int]`, *optional*):
            Counts under `"targets_before"`, `"targets_after"`, `"model_before"` and `"model_after"`.
        num_bytes (`dict[str, int]`, *optional*): Sizes of the weights in safetensors, under `"before"` and `"after"`.
        seconds (`dict[str, float]`, *optional*): Wall-clock time of each stage.
        settings (`dict[str, Any]`, *optional*): `SieveConfig.to_dict()` of the run.
        largest_coefficient (`float`, *optional*): Largest one of the pivoted layers, see `optimum_sieve.surgery.apply`.
        loading (`dict[str, str]`, *optional*): Options that loaded the dense model, such as its dtype.
        tuning (`dict[str, Any]`, *optional*): Figures of the tuning of the dense model, see `Tuning.report`.
        healing (`dict[str, Any]`, *optional*): Result of healing, see `Healer.report`.
        vocabulary (`dict[str, Any]`, *optional*):
            Rows of the embeddings under `"before"` and `"after"`, if the vocabulary was cut; `"trials"` if the
            vocabularies tried were scored.
        latency (`dict[str, float]`, *optional*):
            Total seconds of all targets for one row under `"dense"` and `"pruned"`, each layer measured alone and
            eager, as for `latency_target`.
        label_offsets (`list[dict]`, *optional*): `candidates` and their `offsets` in the pruned model's scores.
        sections (`dict[str, Any]`, *optional*): Further keys; those with `None` are left out.
    """
    report: dict[str, Any] = dict(tasks[0]) if len(tasks) == 1 else {"tasks": list(tasks)}
    for key, value in (
        ("parameters", parameters),
        ("bytes", num_bytes),
        ("largest_coefficient", largest_coefficient),
        ("seconds", seconds),
        ("settings", settings),
        ("loading", loading),
        ("tuning", tuning),
        ("healing", healing),
        ("vocabulary", vocabulary),
        ("latency", latency),
        ("label_offsets", label_offsets),
        *(sections or {}).items(),
    ):
        if value is not None:
            report[key] = value
    report["versions"] = versions()
    return report


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that a run depends on."""
    installed = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def write_report(report: dict[str, Any], path: str | Path) -> None:
    """Write `report` to `path` as JSON with sorted keys, so that runs with the same settings can be compared."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def task_blocks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the blocks of all tasks in a report, see [`task_block`]."""
    return report.get("tasks") or [report]


def remove_scores(report: dict[str, Any]) -> None:
    """Remove what was measured on the pruned model from a report, in place, after its weights were changed."""
    for block in (report, *task_blocks(report)):
        for key in _MEASURED:
            block.pop(key, None)
