"""One page about several pruned models. Does not import torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import cut, shown
from optimum_sieve.publish.report import REPORT_NAME, task_blocks
from optimum_sieve.publish.trials import REFERENCES, reference_key

from .bars import bytes_text, seconds_text
from .load import naming_report, read_report
from .marks import clean
from .render import NARROW, WIDE, render
from .sizes import Group, draw_sizes, sizes_of


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_COLORS = 8


@dataclass(frozen=True)
class Pruned:
    """One pruned model.

    Args:
        name (`str`): What the page calls it.
        path (`Path`): Its directory.
        report (`dict[str, Any]`): Its report.
    """

    name: str
    path: Path
    report: dict[str, Any]

    def task(self, name: str) -> dict[str, Any] | None:
        """Return the block of a task, `None` if the model was not pruned for it."""
        return next((task for task in task_blocks(self.report) if task["task"] == name), None)


def read_pruned(directories: Sequence[str | Path]) -> list[Pruned]:
    """Return the reports of the pruned models in directories.

    Raises:
        FileNotFoundError: If one has no report.
        ValueError: If there are fewer than two, one is named twice, or one is no pruned model with scores.
    """
    if len(directories) < 2:
        raise ValueError(f"`directories` must name at least two pruned models, got {len(directories)}. Add another.")
    paths = [Path(directory) for directory in directories]
    found: list[Pruned] = []
    for name, path in zip(_names(paths), paths, strict=True):
        if path.resolve() in [other.path.resolve() for other in found]:
            raise ValueError(f"`directories` must differ, got {cut(str(path))} twice. Name each one once.")
        _check_pruned(path)
        report = read_report(path)
        with naming_report(path / REPORT_NAME):
            scored = all("pruned" in task for task in task_blocks(report))
        if not scored:
            raise ValueError(f"`{path}` must have scores of the pruned model, got a report without. Evaluate it.")
        found.append(Pruned(clean(name, 60), path, report))
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest endings of the paths that differ."""
    whole = [path.resolve() for path in paths]
    for count in range(1, max(len(path.parts) for path in whole)):
        names = ["/".join(path.parts[-count:]) for path in whole]
        if len(set(names)) == len(set(whole)):
            return names
    return [str(path) for path in whole]


def _check_pruned(path: Path) -> None:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "sieve":
        got = "no readable config.json" if config is None else f"model_type {shown(kind)}"
        raise ValueError(
            f"`directories` must be those of pruned models, got {cut(str(path))} with {got}. Name an --output of "
            "`sieve prune` or `sieve heal`."
        )


def warnings_of(models: Sequence[Pruned]) -> list[str]:
    """Return a sentence for every task whose models were scored on different or unknown test examples."""
    sentences = []
    for name in _tasks(models):
        groups: dict[str | None, list[str]] = {}
        for model in models:
            task = model.task(name)
            if task is not None:
                groups.setdefault(task.get("examples_sha256"), []).append(model.name)
        if len(groups) > 1:
            sides = " / ".join(", ".join(group) for group in groups.values())
            sentences.append(
                f"The scores on {clean(name)} are not comparable: the models were scored on different test examples "
                f"({sides}){', or earlier versions did not say on which' if None in groups else ''}."
            )
    return sentences


def comparison_page(models: Sequence[Pruned]) -> str:
    """Return a page with the curves of all models on one plot for each task, and their figures in a table.

    Raises:
        ValueError: If a report is damaged; the message names none, see
            [`naming_report`][optimum_sieve.publish.page.load.naming_report].
    """
    rows = []
    for model in models:
        with naming_report(model.path / REPORT_NAME):
            rows += list(_rows(model))
    curves = [{"task": clean(name), **_curves(models, name)} for name in _tasks(models)]
    return render("compare.html", models=models, rows=rows, curves=curves, warnings=warnings_of(models))


def _tasks(models: Sequence[Pruned]) -> list[str]:
    return list(dict.fromkeys(task["task"] for model in models for task in task_blocks(model.report)))


def _rows(model: Pruned) -> Iterator[dict[str, Any]]:
    report = model.report
    parameters, num_bytes, seconds = (report.get(key, {}) for key in ("parameters", "bytes", "seconds"))
    before = parameters.get("targets_before")
    for task in task_blocks(report):
        yield {
            "name": model.name,
            "base": clean(report.get("base_model") or ""),
            "task": clean(task["task"]),
            "metric": clean(task["metric"], 30),
            "kept": parameters["targets_after"] / before if before else None,
            "dense": _scored(task.get("dense")),
            "pruned": _scored(task["pruned"]),
            "difference": _scored(task.get("paired_difference")),
            "bytes": bytes_text(num_bytes["after"]) if "after" in num_bytes else "",
            "seconds": seconds_text(sum(seconds.values())) if seconds else "",
        }


def _scored(figures: dict[str, float] | None) -> str:
    if figures is None:
        return ""
    value = f"{figures['score']:.3f}" if "score" in figures else f"{figures['mean']:+.3f}"
    return f"{value} ± {figures['standard_error']:.3f}"


def _curves(models: Sequence[Pruned], name: str) -> dict[str, Any]:
    """Draw the sizes that all models tried on one task."""
    groups, limits, metrics, references = [], [], [], []
    for number, model in enumerate(models):
        task = model.task(name)
        if task is None:
            continue
        with naming_report(model.path / REPORT_NAME):
            groups.append(Group(tuple(sizes_of(model.report, task)), model.name, f"c{number % _COLORS}"))
        tolerance = model.report.get("settings", {}).get("tolerance")
        limits += [] if tolerance is None else [tolerance]
        metrics.append(task["metric"])
        references.append(REFERENCES[reference_key(model.report, task)])
    metric, reference = (" / ".join(dict.fromkeys(words)) for words in (metrics, references))
    return {
        kind: draw_sizes(groups, limits, metric=metric, reference=reference, width=width, kind=kind)
        for kind, width in (("wide", WIDE), ("narrow", NARROW))
    }
