"""How far a model can be pruned within a tolerance: a search on the kept fraction. Does not import torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable

    from .comparison import Comparison


logger = logging.getLogger(__name__)


class ToleranceError(RuntimeError):
    """No size that was tried is within the tolerance."""


def search_kept_fraction(
    compare_at: Callable[[float], Comparison], *, tolerance: float, confidence: float, steps: int
) -> tuple[float, list[dict[str, float]]]:
    """Halve the interval of kept fractions `steps` times; return the least that stayed within `tolerance`.

    A fraction is within the tolerance where the lower bound of the paired score difference, pruned minus dense, at
    one-sided `confidence` is at least `-tolerance`: the mean difference alone would accept a loss hidden by noise.

    Args:
        compare_at (`Callable`): Maps a kept fraction to the comparison of the pruned model with the dense one.
        tolerance (`float`): Loss accepted, in points of the metric.
        confidence (`float`): One-sided confidence, at least 0.5.
        steps (`int`): Fractions tried.

    Returns:
        `tuple[float, list[dict]]`: The kept fraction, and each trial with its figures.

    Raises:
        ToleranceError: If no fraction tried was within the tolerance.
    """
    low, high = 0.0, 1.0
    trials: list[dict[str, float]] = []
    for _ in range(steps):
        kept = (low + high) / 2
        comparison = compare_at(kept)
        bound = comparison.lower_bound(confidence)
        trials.append({"kept": kept, "lower_bound": bound, **comparison.to_dict()})
        logger.info(
            "Kept %.1f %%: score difference %+.4f +- %.4f, lower bound %+.4f, agreement %.3f.",
            100 * kept, comparison.mean, comparison.standard_error, bound, comparison.agreement,
        )  # fmt: skip
        low, high = (low, kept) if bound >= -tolerance else (kept, high)
    if high == 1.0:
        best = max(trials, key=lambda trial: trial["lower_bound"])
        raise ToleranceError(
            f"`tolerance` must leave room for pruning, got {tolerance}: keeping {best['kept']:.1%} of the parameters "
            f"already costs {-best['mean']:.4f} +- {best['standard_error']:.4f}. Accept a larger tolerance, use more "
            "selection examples (a smaller standard error), or set `pruning_ratio`."
        )
    return high, trials
