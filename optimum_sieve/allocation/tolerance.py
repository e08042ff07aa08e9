"""How far a model can be pruned within a tolerance: a search on the kept fraction. Does not import torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from optimum_sieve.evaluation.comparison import Comparison


logger = logging.getLogger(__name__)


class ToleranceError(RuntimeError):
    """No size that was tried is within the tolerance."""


def search_kept_fraction(
    compare_at: Callable[[float], Mapping[str, Comparison]], *, tolerance: float, confidence: float, steps: int
) -> tuple[float, list[dict[str, Any]]]:
    """Halve the interval of kept fractions `steps` times; return the least that stayed within `tolerance`.

    A fraction is within the tolerance where the lower bound of the paired score difference, pruned minus dense, at
    one-sided `confidence` is at least `-tolerance`: the mean difference alone would accept a loss hidden by noise. Of
    several tasks each must be. That needs no correction for their number: a fraction that is too small for one of them
    passes by chance only if that one does.

    Reference: Berger (1982), *Multiparameter hypothesis testing and acceptance sampling*, intersection-union tests.

    Args:
        compare_at (`Callable`): Maps a kept fraction to the comparisons of the pruned model with the dense one, by
            task.
        tolerance (`float`): Loss accepted, in points of the metric.
        confidence (`float`): One-sided confidence, at least 0.5.
        steps (`int`): Fractions tried.

    Returns:
        `tuple[float, list[dict]]`: The kept fraction, and each trial with its figures; with several tasks those of each
        are under `"tasks"`, and `"lower_bound"` is the lowest.

    Raises:
        ToleranceError: If no fraction tried was within the tolerance.
    """
    low, high = 0.0, 1.0
    trials: list[dict[str, Any]] = []
    for _ in range(steps):
        kept = (low + high) / 2
        comparisons = compare_at(kept)
        bounds = {name: one.lower_bound(confidence) for name, one in comparisons.items()}
        trials.append(_trial(kept, comparisons, bounds))
        for name, one in comparisons.items():
            logger.info(
                "Kept %.1f %%, %s: score difference %+.4f +- %.4f, lower bound %+.4f, agreement %.3f.",
                100 * kept, name, one.mean, one.standard_error, bounds[name], one.agreement,
            )  # fmt: skip
        low, high = (low, kept) if min(bounds.values()) >= -tolerance else (kept, high)
    if high == 1.0:
        raise ToleranceError(_nothing_found(trials, tolerance))
    return high, trials


def _trial(kept: float, comparisons: Mapping[str, Comparison], bounds: Mapping[str, float]) -> dict[str, Any]:
    """Describe a fraction that was tried: of one task its figures, of several those of each."""
    if len(comparisons) == 1:
        return {"kept": kept, "lower_bound": min(bounds.values()), **next(iter(comparisons.values())).to_dict()}
    tasks = {name: {"lower_bound": bounds[name], **one.to_dict()} for name, one in comparisons.items()}
    return {"kept": kept, "lower_bound": min(bounds.values()), "tasks": tasks}


def _nothing_found(trials: list[dict[str, Any]], tolerance: float) -> str:
    """Say by how much the best fraction failed, and on which of several tasks."""
    best = max(trials, key=lambda trial: trial["lower_bound"])
    name, worst = min(best.get("tasks", {"": best}).items(), key=lambda item: item[1]["lower_bound"])
    where = f" on {name!r}" if name else ""
    return (
        f"`tolerance` must leave room for pruning, got {tolerance}: keeping {best['kept']:.1%} of the parameters "
        f"already costs {-worst['mean']:.4f} +- {worst['standard_error']:.4f}{where}. Accept a larger tolerance, use "
        "more selection examples (a smaller standard error), or set `pruning_ratio`."
    )
