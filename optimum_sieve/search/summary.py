"""What a search found, as JSON types: what a report is made of. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimum_sieve.search.ranking.across_tasks import Standings

from .bottlenecks import SHARE, bottleneck_table
from .candidate import BOTTLENECK, SEARCH


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from optimum_sieve.search.ranking.by_task import Goal

    from .candidate import AnyOutcome, Candidate
    from .loop import Search


FORMAT_VERSION = 1
# First part of the summary's file name in a work directory.
SUMMARY = "search"


def summarize(search: Search, scored: Sequence[Candidate], metrics: Mapping[str, str]) -> dict[str, Any]:
    """Return everything a report shows.

    Args:
        search (`Search`): The search.
        scored (`Sequence[Candidate]`): All candidates with outcomes.
        metrics (`Mapping[str, str]`): The metric of each task, by its name.

    Raises:
        RuntimeError: If the search has no result.
    """
    names = list(metrics)
    # Corrected, as the search itself ranked and chose.
    space, goal = search.corrected, search.goal
    result = search.result(scored)
    searched = tuple(candidate for candidate in scored if candidate.part == SEARCH)
    standing = Standings(space, searched, goal) if search.preset.guided and goal.kept is None else None

    def described(candidate: Candidate) -> dict[str, Any]:
        rated = standing is not None and candidate.part == SEARCH and candidate in standing.ranking
        return {**describe(search, candidate, names), "size": standing.size(candidate) if standing and rated else None}

    return {
        "format_version": FORMAT_VERSION,
        "metric": ", ".join(dict.fromkeys(metrics.values())),
        "tasks": names,
        "preset": search.preset.name,
        "tolerance": goal.tolerance if goal.kept is None else None,
        "confidence": goal.confidence,
        "ranks": space.ranks(result.genome),
        "result": describe(search, result, names),
        "candidates": [described(candidate) for candidate in scored if candidate.part != BOTTLENECK],
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
        "bottlenecks": bottleneck_table(space, result.genome, scored, goal.tolerance if goal.kept is None else None),
        "bottleneck_share": SHARE,
    }


def describe(search: Search, candidate: Candidate, tasks: Sequence[str]) -> dict[str, Any]:
    """Return a candidate's figures as JSON types; of several tasks those of the worst, and of each under `"tasks"`."""
    outcome = candidate.outcome
    assert outcome is not None
    return {
        "kept": search.space.kept(candidate.genome),
        "predicted_loss": float(search.corrected.losses(candidate.genome).sum()),
        "part": candidate.part,
        "generation": candidate.generation,
        "slot": candidate.slot,
        "origin": candidate.origin,
        "complete": outcome.complete,
        **_figures(outcome, search.goal),
        **(
            {"tasks": {name: _figures(part, search.goal) for name, part in zip(tasks, outcome.parts, strict=True)}}
            if len(tasks) > 1
            else {}
        ),
    }


def _figures(outcome: AnyOutcome, goal: Goal) -> dict[str, Any]:
    return {
        "lower_bound": outcome.bound(goal.confidence),
        "mean": outcome.mean,
        "expected": outcome.expected,
        "standard_error": outcome.standard_error,
        "agreement": outcome.agreement,
        "loss_rise": outcome.rise,
        "kl": outcome.kl,
        "count": outcome.count,
    }
