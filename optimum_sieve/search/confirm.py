r"""Confirm a result on examples the search never saw.

Whatever wins a search on some examples looks better there than it is. So the winner's allocation is tried again at a
ladder of sizes, from one that is surely large enough downward, on fresh examples; the last size before the first that
fails is taken. The order of the tests is fixed beforehand and they stop at the first failure, so the chance that a
result below the tolerance is returned is at most `1 - confidence`, however many sizes were tried.

Reference: Angelopoulos, Bates, Candes, Jordan and Lei (2021), *Learn then test*, fixed-sequence testing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .candidate import CONFIRM, Candidate


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.search.ranking.by_task import Goal

    from .genome import Genome, SearchSpace


# Kept fractions above the size where the search put the limit, then the steps below it. A few hundred examples say
# where the limit lies to some .06, so most results are found among the steps of .02.
_ABOVE = (0.24, 0.14, 0.1, 0.07, 0.045, 0.02)
_STEP, _STEPS_BELOW = 0.02, 12


def ladder(space: SearchSpace, genome: Genome, size: float) -> list[Genome]:
    """Return the genome's allocation at falling sizes around `size`, each smaller than the one before."""
    prices = space.log_prices(genome)
    # The size is extrapolated, so it may lie outside where nearly everything, or nearly nothing, can go.
    size = min(max(size, _STEP), 1 - _STEP)
    sizes = [size + above for above in _ABOVE] + [size - step * _STEP for step in range(_STEPS_BELOW)]
    genomes = [space.at_prices(prices, min(kept, 1 - _STEP)) for kept in sizes if kept > 0]
    return list(dict.fromkeys(genomes))


def next_step(steps: Sequence[Genome], tried: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """Return the next size to try, or none where one has failed or all are tried."""
    if len(tried) == len(steps) or (tried and not _holds(tried[-1], goal)):
        return []
    place = len(tried)
    return [Candidate(genome=steps[place], part=CONFIRM, generation=place, slot=0, origin="confirmation")]


def confirmed(tried: Sequence[Candidate], goal: Goal) -> Candidate | None:
    """Return the smallest candidate that held before the first that did not."""
    best = None
    for candidate in tried:
        if not _holds(candidate, goal):
            break
        best = candidate
    return best


def _holds(candidate: Candidate, goal: Goal) -> bool:
    return candidate.outcome is not None and candidate.outcome.bound(goal.confidence) >= -goal.tolerance
