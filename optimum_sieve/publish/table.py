"""A report as a table on a terminal. Does not import torch."""

from __future__ import annotations

from typing import Any

from optimum_sieve.metrics.scored import EXAMPLES

from .report import task_blocks
from .trials import trial_lines, verdict_lines


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


def _title(task: dict[str, Any]) -> str:
    title = f"{task['task']}: {task['count']:,} examples of the {task['split']} split"
    if "majority_score" in task:
        title += f", most frequent answer {task['majority_score']:.3f}"
    if task.get("error_method", EXAMPLES) != EXAMPLES:
        title += f", errors by {task['error_method']}"
    return title + (f", scored against the {task['references']}'s own answers" if "references" in task else "")


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
