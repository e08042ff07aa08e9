"""Measure which matrices hold the result back: lower each alone by one level. Does not import torch.

A level here is one of LLM-Sieve's kept fractions, whatever levels the search used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve.metrics.scored import standard_error

from .candidate import BOTTLENECK, Candidate, of_part
from .presets import PAPER_LEVELS


if TYPE_CHECKING:
    from collections.abc import Sequence

    from .genome import Genome, SearchSpace


_LEVELS = (*PAPER_LEVELS, 0.0)
# A bottleneck costs more than this fraction of the tolerance, and more than this many standard errors.
SHARE, ERRORS = 0.25, 1.64


def lowered(space: SearchSpace, genome: Genome, index: int) -> Genome:
    """Return the genome with one matrix at the next lower level, if there is one."""
    gene, level = space.genes[index], genome[index]
    kept = gene.parameters / gene.parameters[-1]
    goal = max((fraction for fraction in _LEVELS if fraction < kept[level] - 1e-9), default=0.0)
    below = int(np.searchsorted(kept, goal, side="right")) - 1
    return (*genome[:index], max(0, min(below, level)), *genome[index + 1 :])


def bottleneck_candidates(space: SearchSpace, genome: Genome, count: int) -> list[Candidate]:
    """Return the genome itself and `count` genomes with one matrix lowered: those with the highest predicted cost."""
    if not count:
        return []
    changed = {index: lowered(space, genome, index) for index in range(len(genome))}
    losses = {index: space.losses(other).sum() for index, other in changed.items() if other != genome}
    worst = sorted(losses, key=lambda index: -losses[index])[:count]
    chosen = {-1: genome, **{index: changed[index] for index in worst}}
    return [
        Candidate(genome=other, part=BOTTLENECK, generation=0, slot=index, origin="bottleneck")
        for index, other in chosen.items()
    ]


def bottleneck_table(
    space: SearchSpace, genome: Genome, scored: Sequence[Candidate], tolerance: float | None
) -> list[dict[str, Any]]:
    """List the cost of lowering each measured matrix, highest cost first.

    Returns:
        `list[dict]`: `name`, `rank` and `lowered_rank`; `cost`, in points of the metric against the pruned model;
        `loss_rise`; `is_bottleneck`, whether the cost exceeds a quarter of the tolerance and 1.64 errors.
    """
    outcomes = {c.slot: (c.genome, c.outcome) for c in of_part(scored, BOTTLENECK) if c.outcome}
    if -1 not in outcomes:
        return []
    _, base = outcomes.pop(-1)
    rows = []
    for index, (other, outcome) in outcomes.items():
        # The task on which lowering the matrix costs most.
        pairs = zip(base.parts, outcome.parts, strict=True)
        before, after = max(pairs, key=lambda pair: pair[0].mean - pair[1].mean)
        rise, cost = after.rises - before.rises, before.mean - after.mean
        error = standard_error(before.differences - after.differences)
        gene = space.genes[index]
        rows.append(
            {
                "name": gene.name,
                "rank": gene.ranks[genome[index]],
                "lowered_rank": gene.ranks[other[index]],
                "saved_parameters": space.parameters(genome) - space.parameters(other),
                "cost": cost,
                "cost_standard_error": error,
                "loss_rise": float(rise.mean()),
                "loss_rise_standard_error": standard_error(rise),
                "count": after.count,
                "is_bottleneck": tolerance is not None and cost > max(SHARE * tolerance, ERRORS * error),
            }
        )
    return sorted(rows, key=lambda row: (-row["cost"], -row["loss_rise"], row["name"]))
