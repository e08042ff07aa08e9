"""The descent: heal falling sizes until two in a row exceed the tolerance.

The sizes are tested from large to small. If the descent stopped at the first one that fails, the chance that a size
beyond the tolerance is accepted would be at most `1 - confidence`, however many sizes are tested. It goes on past one
failure, since training moves the score of each size up or down; docs/measurements.md#certainty simulates what this adds
to that chance. So do a first look (`allocation.certainty.is_settled`) and the size that holds without training, on
which the first size depends. Sizes that are left out (`allocation.tolerance.sizes_to_try`) add nothing.

Reference: Angelopoulos, Bates, Candes, Jordan and Lei (2021), *Learn then test*, fixed-sequence testing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from optimum_sieve.allocation.tolerance import FINE, SMALLEST_KEPT, size_trial, sizes_to_try
from optimum_sieve.config.heal import LARGEST_HEALED
from optimum_sieve.evaluation.stage import compare_selection
from optimum_sieve.healing.lessons import heal_config
from optimum_sieve.run import distributed

from .progress import show_trial


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from optimum_sieve.calibration.rounds import Bases
    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.healing.size import HealedSize
    from optimum_sieve.healing.stage import Healer
    from optimum_sieve.run.context import Run


def descend_within(
    run: Run, bases: Bases, healer: Healer, reference: Sequence[Evaluation], before: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Heal falling sizes until two in a row exceed the tolerance; return their records. The model is dense afterwards.

    Args:
        run (`Run`): The run, whose settings have a `tolerance`.
        bases (`Bases`): The basis of every target.
        healer (`Healer`): Its `kept_without` sets the first size, its `best` size is the result.
        reference (`Sequence[Evaluation]`): Evaluation of the model that the tolerance is measured from on the selection
            split of each task.
        before (`Sequence[dict]`): Records of the sizes tried without training, for the progress in the work directory.
    """
    config = run.config
    trials: list[dict[str, Any]] = []

    def accept(size: HealedSize) -> bool:
        comparisons = compare_selection(run, reference, label=f"healed, kept {size.kept:.1%}", pruned=size.key)
        trial = size_trial(size.kept, comparisons, config.confidence, asked=size.asked)
        accepted = bool(trial["lower_bound"] >= -(config.tolerance or 0.0))
        trials.append({**trial, "healed": True, "accepted": accepted})
        show_trial(run, [*before, *trials], healer)
        return accepted

    healer.descend(bases, _sizes_in_time(run, healer, trials), accept)
    return trials


def _sizes_in_time(run: Run, healer: Healer, trials: Sequence[dict[str, Any]]) -> Iterator[float]:
    """Yield the kept fractions to heal; stop before one that would end after the time limit. Say why in the healer."""
    config, unhealed = heal_config(run), healer.kept_without
    longest = 0.0
    for kept in sizes_to_try(_ladder(unhealed, config.shrink), trials):
        started = time.monotonic()
        # Every process must go on or stop with the others.
        if not distributed.agree(run.seconds_left > longest):
            healer.stopped = "time_limit"
            return
        yield kept
        longest = max(longest, time.monotonic() - started)
    healer.stopped = "smallest_size"


def _ladder(unhealed: float | None, shrink: float) -> list[float]:
    """Return the kept fractions that may be healed, below the smallest one that holds without training.

    One of at most `FINE` is healed itself too: without training it may hold and still be far from its best.
    """
    kept = LARGEST_HEALED
    if unhealed is not None:
        kept = min(kept, unhealed * shrink if unhealed > FINE else unhealed)
    sizes = []
    # The last two are not close to each other.
    while kept > SMALLEST_KEPT / shrink**2:
        sizes.append(kept)
        kept *= shrink ** (1 if kept > FINE else 4)
    # A search may find a smaller one.
    return [*sizes, SMALLEST_KEPT if unhealed is None else min(SMALLEST_KEPT, unhealed)]
