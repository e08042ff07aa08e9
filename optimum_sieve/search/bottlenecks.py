"""Which matrices hold the result back: each is lowered alone by one level, and what that costs is measured.

A level here is one of LLM-Sieve's kept fractions, whatever grid the search used. Does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from optimum_sieve.tasks.metrics import standard_error

from .candidate import BOTTLENECK, Candidate
from .presets import PRESETS


if TYPE_CHECKING:
    from collections.abc import Sequence

    from .genome import Genome, SearchSpace


LEVELS = (*(PRESETS["paper"].levels or ()), 0.0)
# A matrix is a bottleneck where lowering it costs more than this share of the tolerance, and surely something: more
# than this many standard errors.
SHARE, ERRORS = 0.25, 1.64


def lowered(space: SearchSpace, genome: Genome, place: int) -> Genome:
    """Return the genome with one matrix at the next level below its own; as it is where there is none."""
    gene, level = space.genes[place], genome[place]
    kept = gene.parameters / gene.parameters[-1]
    goal = max((own for own in LEVELS if own < kept[level] - 1e-9), default=0.0)
    below = int(np.searchsorted(kept, goal, side="right")) - 1
    return (*genome[:place], max(0, min(below, level)), *genome[place + 1 :])


def bottleneck_candidates(space: SearchSpace, genome: Genome, count: int) -> list[Candidate]:
    """Return the genome itself and, `count` times, with one matrix lowered: those predicted to cost most."""
    if not count:
        return []
    base = space.losses(genome)
    changed = [lowered(space, genome, place) for place in range(len(genome))]
    rises = [float(space.losses(other)[place] - base[place]) for place, other in enumerate(changed)]
    worst = sorted(
        (place for place in range(len(genome)) if changed[place] != genome), key=lambda place: -rises[place]
    )[:count]
    chosen = [(genome, -1), *((changed[place], place) for place in worst)]
    return [
        Candidate(genome=own, part=BOTTLENECK, generation=0, slot=place, origin="bottleneck") for own, place in chosen
    ]


def bottleneck_table(
    space: SearchSpace, genome: Genome, scored: Sequence[Candidate], tolerance: float | None
) -> list[dict[str, Any]]:
    """List what lowering each measured matrix cost, the dearest first.

    Returns:
        `list[dict]`: `name`, `rank` and `lowered_rank`; `cost`, the points of the metric lost against the pruned model
        itself; `loss_rise`; `is_bottleneck`, whether the cost exceeds a quarter of the tolerance and 1.64 errors.
    """
    found = {c.slot: c for c in scored if c.part == BOTTLENECK and c.outcome}
    base = found.pop(-1, None)
    if base is None or base.outcome is None:
        return []
    rows = []
    for place, candidate in found.items():
        assert candidate.outcome is not None
        gene = space.genes[place]
        # Of several tasks, the one on which lowering the matrix costs most.
        pairs = zip(base.outcome.parts, candidate.outcome.parts, strict=True)
        before, after = max(pairs, key=lambda pair: pair[0].mean - pair[1].mean)
        rise = after.rises - before.rises
        error = standard_error(before.differences - after.differences)
        cost = before.mean - after.mean
        rows.append(
            {
                "name": gene.name,
                "rank": gene.ranks[genome[place]],
                "lowered_rank": gene.ranks[candidate.genome[place]],
                "saved_parameters": int(space.parameters(genome) - space.parameters(candidate.genome)),
                "cost": cost,
                "cost_standard_error": error,
                "loss_rise": float(rise.mean()),
                "loss_rise_standard_error": standard_error(rise),
                "count": after.count,
                "is_bottleneck": tolerance is not None and cost > max(SHARE * tolerance, ERRORS * error),
            }
        )
    return sorted(rows, key=lambda row: (-row["cost"], -row["loss_rise"], row["name"]))
