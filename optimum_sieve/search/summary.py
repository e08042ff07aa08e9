"""Summarize a search as JSON types, for reports. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .bottlenecks import SHARE, bottleneck_table
from .candidate import BOTTLENECK, SEARCH, of_part
from .ranking import Ranking


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .candidate import Candidate, Outcome
    from .loop import Search


FORMAT_VERSION = 1
# First part of the summary's file name in a work directory.
SUMMARY = "search"


def summarize(search: Search, scored: Sequence[Candidate], metrics: Mapping[str, str]) -> dict[str, Any]:
    """Return the contents of a report; `metrics` maps the name of each task to its metric.

    Raises:
        RuntimeError: If the search has no result.
    """
    space, goal, tasks = search.corrected, search.goal, list(metrics)
    result = search.result(scored)
    tolerance = goal.tolerance if goal.kept is None else None
    sizes = {}
    if search.preset.name == "fast" and goal.kept is None:
        ranking = Ranking(space, of_part(scored, SEARCH), goal)
        sizes = {candidate.key: ranking.size(candidate) for candidate in ranking.best_first}
    return {
        "format_version": FORMAT_VERSION,
        "metric": ", ".join(dict.fromkeys(metrics.values())),
        "tasks": tasks,
        "preset": search.preset.name,
        "tolerance": tolerance,
        "confidence": goal.confidence,
        "ranks": space.ranks(result.genome),
        "result": _describe(search, result, tasks),
        "candidates": [
            {**_describe(search, candidate, tasks), "size": sizes.get(candidate.key)}
            for candidate in scored
            if candidate.part != BOTTLENECK
        ],
        "matrices": [
            {
                "name": gene.name,
                "layer": layer,
                "kind": kind,
                "kept": float(gene.parameters[level] / gene.parameters[-1]),
                "rank": gene.ranks[level],
                "parameters": int(gene.parameters[-1]),
            }
            for gene, layer, kind, level in zip(space.genes, space.layers, space.kinds, result.genome, strict=True)
        ],
        "bottlenecks": bottleneck_table(space, result.genome, scored, tolerance),
        "bottleneck_share": SHARE,
    }


def _describe(search: Search, candidate: Candidate, tasks: Sequence[str]) -> dict[str, Any]:
    """Return a candidate's figures; those of several tasks are the worst, with each task's under `"tasks"`."""
    outcome, confidence = candidate.outcome, search.goal.confidence
    assert outcome is not None
    by_task = {name: _figures(part, confidence) for name, part in zip(tasks, outcome.parts, strict=True)}
    return {
        "kept": search.space.kept(candidate.genome),
        "predicted_loss": float(search.corrected.losses(candidate.genome).sum()),
        **{name: getattr(candidate, name) for name in ("part", "generation", "slot", "origin")},
        "complete": outcome.complete,
        **_figures(outcome, confidence),
        **({"tasks": by_task} if len(tasks) > 1 else {}),
    }


def _figures(outcome: Outcome, confidence: float) -> dict[str, Any]:
    names = ("mean", "expected", "standard_error", "agreement", "kl", "count")
    figures = {name: getattr(outcome, name) for name in names}
    return {**figures, "lower_bound": outcome.bound(confidence), "loss_rise": outcome.rise}
