r"""Confirm a result on examples that the search never saw. Does not import torch.

The winner of a search looks better on its examples than it is. So its allocation is tested again at a ladder of sizes,
from one that is surely large enough downward, on fresh examples; the result is the last size before the first failure.
The order of the tests is fixed beforehand and they stop at the first failure, so the chance that a result below the
tolerance is returned is at most `1 - confidence`, however many sizes were tested.

Reference: Angelopoulos, Bates, Candes, Jordan and Lei (2021), *Learn then test*, fixed-sequence testing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .candidate import CONFIRM, Candidate


if TYPE_CHECKING:
    from collections.abc import Sequence

    from .genome import Genome, SearchSpace
    from .ranking import Goal


# Kept fractions above the size where the search put the limit, then the steps below it. A few hundred examples locate
# the limit to some .06, so most results are among the steps of .02.
_ABOVE = (0.24, 0.14, 0.1, 0.07, 0.045, 0.02)
_STEP, _STEPS_BELOW = 0.02, 12


def ladder(space: SearchSpace, genome: Genome, size: float) -> list[Genome]:
    """Return the genome's allocation at falling sizes around `size`, each smaller than the one before."""
    prices = space.log_prices(genome)
    # The extrapolated size may lie outside the range in which sizes differ.
    size = min(max(size, _STEP), 1 - _STEP)
    sizes = [size + above for above in _ABOVE] + [size - step * _STEP for step in range(_STEPS_BELOW)]
    genomes = [space.at_prices(prices, min(kept, 1 - _STEP)) for kept in sizes if kept > 0]
    return list(dict.fromkeys(genomes))


def next_step(steps: Sequence[Genome], tested: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """Return the next size to test, or none after a failure or the last size."""
    step = len(tested)
    if step == len(steps) or (tested and not _holds(tested[-1], goal)):
        return []
    return [Candidate(genome=steps[step], part=CONFIRM, generation=step, slot=0, origin="confirmation")]


def confirmed(tested: Sequence[Candidate], goal: Goal) -> Candidate | None:
    """Return the last candidate that held before the first that did not."""
    best = None
    for candidate in tested:
        if not _holds(candidate, goal):
            break
        best = candidate
    return best


def _holds(candidate: Candidate, goal: Goal) -> bool:
    return candidate.outcome is not None and candidate.outcome.bound(goal.confidence) >= -goal.tolerance
