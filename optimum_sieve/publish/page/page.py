"""The page of one pruned model, and the picture of its card, from its report alone. Does not import torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup

from optimum_sieve.publish.report import task_blocks
from optimum_sieve.publish.reproduction import dense_name, healing_command, reproduction_command, task_file_names
from optimum_sieve.publish.trials import (
    REFERENCES,
    answer,
    by_task,
    reference_key,
    size_name,
    stop_sentences,
    verdict,
)

from .bars import part_bars, part_table, second_bars
from .curves import draw_losses, draw_spectra, trainings_of
from .marks import below, clean, element, figure
from .plot import percent
from .ranks import draw_ranks
from .render import NARROW, WIDE, render, style
from .sizes import Group, draw_sizes, sizes_of
from .tiles import tiles_of, verdict_kind


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PAGE_NAME = "report.html"
PICTURE_NAME = "sieve_curve.svg"
_DIFFERENCES = (("paired_difference", "difference to dense"), ("difference_to_tuned", "difference to tuned"))


def report_page(report: dict[str, Any], examples: Sequence[dict[str, Any]] | None = None) -> str:
    """Return the page of a report: the same bytes for the same report, whatever the order of its keys.

    Args:
        report (`dict[str, Any]`): Content of `sieve_report.json`.
        examples (`Sequence[dict]`, *optional*): Examples of each task that are answered differently, see
            [`differing`][optimum_sieve.publish.page.examples.differing]. Such a page must not be published.

    Raises:
        ValueError: If the report is not one of this package.
    """
    report = json.loads(json.dumps(report, sort_keys=True))
    tasks, settings = task_blocks(report), report.get("settings", {})
    scored = [task for task in tasks if "count" in task]
    return render(
        "report.html",
        with_examples=examples is not None,
        heading=_heading(report, tasks),
        base=clean(report["base_model"]) if report.get("base_model") else None,
        complete=report.get("complete", True),
        tasks=tasks,
        tiles=tiles_of(report, tasks),
        verdicts=_verdicts(report, tasks),
        scored=scored,
        sides=[side for side in ("dense", "tuned", "pruned") if any(side in task for task in tasks)],
        differences=[(key, label) for key, label in _DIFFERENCES if any(key in task for task in tasks)],
        references=", ".join(clean(task["task"]) for task in scored if "references" in task),
        curves=[{"task": clean(task["task"]), **_both(_curve(report, task))} for task in tasks if _has_curve(report)],
        confidence=settings.get("confidence"),
        stops=[sentence[0].upper() + sentence[1:] for sentence in stop_sentences(report)],
        trials=_trial_table(report, tasks),
        ranks=_both(lambda **look: draw_ranks(report["ranks"], **look)) if _filled(report.get("ranks")) else None,
        experts=any("*" in kind for kind in report.get("ranks", {}).get("kinds", [])),
        parts=part_bars(report.get("parts")),
        parts_table=part_table(report.get("parts")),
        seconds=second_bars(report.get("seconds", {})),
        losses=_both(lambda **look: draw_losses(trainings_of(report), **look)) if trainings_of(report) else None,
        spectra=_both(lambda **look: draw_spectra(report["spectra"], **look)) if "spectra" in report else None,
        answers=[_answers(task) for task in tasks if "agreement" in task],
        examples=examples,
        command=_command(report, tasks),
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True) if settings else "",
        versions=", ".join(f"{clean(name)} {clean(number)}" for name, number in report.get("versions", {}).items()),
    )


def card_picture(report: dict[str, Any]) -> str | None:
    """Return the figure of the sizes tried as an SVG file; `None` if none was tried.

    Several tasks have a figure each, one below the other.
    """
    if not _has_curve(report):
        return None
    placed, height = below([_curve(report, task)(width=WIDE) for task in task_blocks(report)])
    look = element("style", Markup("\n{}\n").format(Markup(style("figure.css"))))
    paper = element("rect", width="100%", height="100%", class_="paper")
    label = "Score difference to the dense model against the parameters kept"
    return f"{figure(WIDE, height, label, look, paper, *placed, kind='alone')}\n"


def _both(draw: Callable[..., Markup]) -> dict[str, Markup]:
    """Draw a figure for wide and for narrow screens; the style shows one of them."""
    return {"wide": draw(width=WIDE, kind="wide"), "narrow": draw(width=NARROW, kind="narrow")}


def _has_curve(report: dict[str, Any]) -> bool:
    return bool(report.get("trials"))


def _filled(ranks: dict[str, Any] | None) -> bool:
    return bool(ranks and ranks["layers"] and ranks["kinds"])


def _curve(report: dict[str, Any], task: dict[str, Any]) -> Callable[..., Markup]:
    """Return what draws the sizes on one task."""
    tolerance = report.get("settings", {}).get("tolerance")

    def draw(**look: Any) -> Markup:
        return draw_sizes(
            [Group(tuple(sizes_of(report, task)))],
            [] if tolerance is None else [tolerance],
            metric=f"{clean(task['task'], 40)}: {task['metric']}" if "tasks" in report else task["metric"],
            reference=REFERENCES[reference_key(report, task)],
            **look,
        )

    return draw


def _heading(report: dict[str, Any], tasks: Sequence[dict[str, Any]]) -> str:
    base = clean(report.get("base_model") or "Model").rpartition("/")[2]
    return f"{base}, pruned for {', '.join(clean(task['task']) for task in tasks)}"


def _verdicts(report: dict[str, Any], tasks: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    found = [(task, verdict(report, task)) for task in tasks]
    prefix = "{}: " if len(tasks) > 1 else ""
    return [
        {
            "kind": verdict_kind(sentence),
            "text": prefix.format(clean(task["task"])) + sentence[0].upper() + sentence[1:] + ".",
        }
        for task, sentence in found
        if sentence
    ]


def _trial_table(report: dict[str, Any], tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "size": size_name(trial),
            "task": task["task"],
            "kept": trial["kept"],
            "figures": by_task(trial, task["task"]),
            "answer": answer(trial),
        }
        for trial in report.get("trials", [])
        for task in tasks
    ]


def _answers(task: dict[str, Any]) -> dict[str, Any]:
    before = "tuned" if "tuned" in task else "dense"
    cells = task.get("answers", {})
    text = f"The pruned model gives the {before} model's answer to {percent(task['agreement'])} of the examples."
    if "kl" in task:
        text += f" The mean divergence from its distribution over the answers is {task['kl']:.4f} nats."
    if "worse" in cells:
        text += f" {cells['worse']:,} answers score lower than its own, {cells['better']:,} higher."
    return {
        "task": clean(task["task"]),
        "text": text,
        "before": before,
        "count": f"{task['count']:,}",
        "cells": cells if "both_right" in cells else None,
    }


def _command(report: dict[str, Any], tasks: Sequence[dict[str, Any]]) -> str | None:
    """Return the command lines that make the model again, as in its card."""
    settings, files = report.get("settings"), task_file_names(len(tasks))
    if not settings:
        return None
    base = clean(dense_name(report, report.get("base_model") or "MODEL"))
    heal = healing_command(base, report.get("healing", {}), files)
    command = reproduction_command(base, settings, report.get("loading"), files)
    return f"{command}\n{heal}" if heal else command
