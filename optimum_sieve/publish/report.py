"""Report of a run: the content of `sieve_report.json`, and its form on a terminal. Does not import torch."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve.run.files import replacing

from .sections import answers_section
from .trials import trial_lines, verdict_lines


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.evaluation.comparison import Comparison
    from optimum_sieve.evaluation.scores import Evaluation

REPORT_NAME = "sieve_report.json"
# That of `modeling.fingerprint`, which imports torch.
DIGEST_KEY = "weights_sha256"
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
    report: dict[str, Any] = {
        "task": task_name,
        "split": split,
        "metric": scored[0].metric,
        "count": scored[0].count,
        "majority_score": float(scored[0].majority_score),
        "examples_sha256": scored[0].fingerprint,
    }
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
        sections (`dict[str, Any]`, *optional*): Further keys, of which those with `None` are left out.
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


def format_table(report: dict[str, Any]) -> str:
    """Format a report for a terminal: a row per measure, a column per model; missing keys are left out.

    Args:
        report (`dict[str, Any]`): A report of [`build_report`][optimum_sieve.publish.report.build_report].

    Returns:
        `str`: Several lines, without a trailing newline.

    Example:

    ```python
    >>> print(format_table({"task": "toy", "split": "test", "metric": "accuracy", "count": 200,
    ...                     "majority_score": 0.5, "dense": {"score": 0.8, "standard_error": 0.0283}}))
    toy: 200 examples of the test split, most frequent answer 0.500
    <BLANKLINE>
                      dense
    accuracy  0.800 ± 0.028

    ```
    """
    rows = [row for row in _rows(report) if any(row[1:])]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells)).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in zip(*columns, strict=True))
    ]
    below = [*trial_lines(report), *_healing_line(report), *verdict_lines(report, task_blocks(report))]
    return "\n".join([*map(_title, task_blocks(report)), "", *lines, *below, *_seconds_line(report)])


def task_blocks(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the blocks of all tasks in a report, see [`task_block`]."""
    return report.get("tasks") or [report]


def remove_scores(report: dict[str, Any]) -> None:
    """Remove what was measured on the pruned model from a report, in place, after its weights were changed."""
    for block in (report, *task_blocks(report)):
        for key in _MEASURED:
            block.pop(key, None)


def _title(task: dict[str, Any]) -> str:
    title = (
        f"{task['task']}: {task['count']:,} examples of the {task['split']} split, "
        f"most frequent answer {task['majority_score']:.3f}"
    )
    return title + (f", scored against the {task['references']}'s own answers" if "references" in task else "")


def size_changes(report: dict[str, Any]) -> list[tuple[str, int, int]]:
    """List the sizes in a report as (label, before, after), without those known for one model only."""
    parameters, num_bytes = report.get("parameters", {}), report.get("bytes", {})
    vocabulary = report.get("vocabulary", {})
    latency = {name: round(1e6 * seconds) for name, seconds in report.get("latency", {}).items()}
    pairs = [
        ("tokens of the vocabulary", vocabulary.get("before"), vocabulary.get("after")),
        ("parameters of the target matrices", parameters.get("targets_before"), parameters.get("targets_after")),
        ("parameters of the model", parameters.get("model_before"), parameters.get("model_after")),
        ("bytes of the weights (safetensors)", num_bytes.get("before"), num_bytes.get("after")),
        ("microseconds of the target matrices for one row", latency.get("dense"), latency.get("pruned")),
    ]
    return [(label, before, after) for label, before, after in pairs if before and after is not None]


def _rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    tasks = task_blocks(report)
    is_tuned = "tuned" in tasks[0]
    return [
        ("", "dense", "tuned", "pruned", *(("to dense", "to tuned") if is_tuned else ("difference", ""))),
        *(row for task in tasks for row in _task_rows(task, f"{task['task']}: " if len(tasks) > 1 else "")),
        *_vocabulary_rows(report),
        *(
            (label, f"{before:,}", "", f"{after:,}", f"{after / before - 1:+.1%}", "")
            for label, before, after in size_changes(report)
        ),
    ]


def _vocabulary_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Show the loss by removed tokens alone, on the selection split, if it was measured."""
    trials = report.get("vocabulary", {}).get("trials", [])
    losses = [_with_error(trial) for trial in trials[-1:]]
    # The tokens are removed from the tuned model.
    places = [("", loss) if "tuned" in task_blocks(report)[0] else (loss, "") for loss in losses]
    return [("removed tokens alone (selection split)", "", "", "", *place) for place in places]


def _task_rows(task: dict[str, Any], prefix: str) -> list[tuple[str, ...]]:
    keys = ("dense", "tuned", "pruned", "paired_difference", "difference_to_tuned")
    names = ("agreement with tuned", "KL to tuned") if "tuned" in task else ("agreement", "KL to dense")
    values = (f"{task['agreement']:.3f}" if "agreement" in task else "", f"{task['kl']:.4f}" if "kl" in task else "")
    return [
        (prefix + task["metric"], *(_with_error(task.get(key)) for key in keys)),
        *((prefix + name, "", "", value, "", "") for name, value in zip(names, values, strict=True)),
    ]


def _with_error(measure: dict[str, float] | None) -> str:
    """Format a score, or the mean of a paired difference with its sign, with its standard error."""
    if measure is None:
        return ""
    value = f"{measure['score']:.3f}" if "score" in measure else f"{measure['mean']:+.3f}"
    return f"{value} ± {measure['standard_error']:.3f}"


def _healing_line(report: dict[str, Any]) -> list[str]:
    """State the size within the tolerance without and with healing, if both were searched."""
    healing = report.get("healing", {})
    if "kept_without" not in healing or report.get("settings", {}).get("tolerance") is None:
        return []
    without, kept = (f"{x:.1%}" if x is not None else "none" for x in (healing["kept_without"], healing["kept"]))
    smaller = "smaller " if kept == "none" and without != "none" else ""
    return ["", f"smallest size within the tolerance: {without} without healing, {kept} {smaller}with it"]


def _seconds_line(report: dict[str, Any]) -> list[str]:
    seconds = report.get("seconds")
    return ["", "seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())] if seconds else []
