"""Find the smallest kept fraction within a tolerance by bisection. Never imports torch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from optimum_sieve.evaluation.comparison import Comparison


logger = logging.getLogger(__name__)

# No smaller fraction is tried: it saves little beside embeddings and head, and takes as long as a large one.
SMALLEST_KEPT = 0.02
# Below this, a size more or less saves little: a descent takes steps four times as large, and starts without knowing
# better which one holds without training.
FINE = 0.1


class ToleranceError(RuntimeError):
    """No size tried is within the tolerance.

    Args:
        message (`str`): The message.
        trials (`list[dict]`): Records of the sizes that were tried.
    """

    def __init__(self, message: str, trials: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.trials = list(trials)


def search_kept_fraction(
    compare_at: Callable[[float], Mapping[str, Comparison]],
    *,
    tolerance: float,
    confidence: float,
    steps: int,
    enough: float = SMALLEST_KEPT,
    kept_by_ranks: Callable[[float], float] = lambda asked: asked,
    goes_on: Callable[[], bool] = lambda: True,
    on_trial: Callable[[Sequence[dict[str, Any]]], object] = lambda trials: None,
) -> tuple[float, list[dict[str, Any]]]:
    """Bisect the kept fraction in `steps` steps; return the smallest one within `tolerance`, at least `SMALLEST_KEPT`.

    A fraction is within the tolerance if the lower bound of the paired score difference, pruned minus dense, at
    one-sided `confidence` is at least `-tolerance`. The mean difference alone would accept a loss hidden by noise. With
    several tasks, each must be within the tolerance. This needs no correction for multiple tests: a fraction too small
    for one task passes by chance only if that task's test does.

    Reference: Berger (1982), *Multiparameter hypothesis testing and acceptance sampling*, intersection-union tests.

    Args:
        compare_at (`Callable`): Maps a kept fraction to the comparison of pruned and dense model for each task, by
            name.
        tolerance (`float`): Largest acceptable drop in the metric, in absolute points.
        confidence (`float`): One-sided confidence, at least 0.5.
        steps (`int`): Number of fractions to try, at most.
        enough (`float`): The bisection ends at a fraction within the tolerance that is not larger.
        kept_by_ranks (`Callable`): Maps a fraction to the one that its ranks keep, which is at most that.
        goes_on (`Callable`): Whether there is time for another fraction; asked before every one but the first.
        on_trial (`Callable`): Receives the records of all trials so far after each one.

    Returns:
        `tuple[float, list[dict]]`: The fraction that was asked for and the record of each trial. With several tasks,
            `"tasks"` holds their records and `"lower_bound"` is the lowest.

    Raises:
        ToleranceError: If no fraction tried is within the tolerance.
    """
    low, high = 0.0, 1.0
    trials: list[dict[str, Any]] = []
    for step in range(steps):
        if high <= enough or (step and not goes_on()):
            break
        asked = max((low + high) / 2, SMALLEST_KEPT)
        comparisons, kept = compare_at(asked), kept_by_ranks(asked)
        bounds = {name: comparison.lower_bound(confidence) for name, comparison in comparisons.items()}
        accepted = min(bounds.values()) >= -tolerance
        trials.append({**size_trial(kept, comparisons, confidence, asked=asked), "accepted": accepted})
        on_trial(trials)
        for name, comparison in comparisons.items():
            logger.info(
                "Kept %.1f %%, %s: score difference %+.4f +- %.4f, lower bound %+.4f, agreement %.3f.",
                100 * kept, name, comparison.mean, comparison.standard_error, bounds[name], comparison.agreement,
            )  # fmt: skip
        low, high = (low, asked) if accepted else (asked, high)
    if high == 1.0:
        raise ToleranceError(_failure(trials, tolerance), trials)
    return high, trials


def size_trial(
    kept: float, comparisons: Mapping[str, Comparison], confidence: float, *, asked: float
) -> dict[str, Any]:
    """Return the record of one size: flat for one task, nested under `"tasks"` for several.

    It has both the fraction that the ranks keep and the one that was asked for.
    """
    bounds = {name: comparison.lower_bound(confidence) for name, comparison in comparisons.items()}
    size = {"kept": kept, "asked": asked, "lower_bound": min(bounds.values())}
    if len(comparisons) == 1:
        return {**size, **next(iter(comparisons.values())).to_dict()}
    tasks = {name: {"lower_bound": bounds[name], **comparison.to_dict()} for name, comparison in comparisons.items()}
    return {**size, "tasks": tasks}


def sizes_to_try(sizes: Sequence[float], trials: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Yield falling sizes in the order in which a descent tries them.

    A size whose lower bound shows no loss at all is far from the smallest one that holds, so the size below it is left
    out. If the one after that fails, the one left out is tried before those below. A descent that ends after two sizes
    in a row that fail, counted from large to small, accepts the same size as if it tried them all.

    Args:
        sizes (`Sequence[float]`): All sizes, falling.
        trials (`Sequence[Mapping]`): Must end with the record of each size, see [`size_trial`], with whether it was
            `accepted`, before the next one is taken.

    Example:

    ```python
    >>> trials, bounds = [], {0.5: 0.01, 0.4: -0.01, 0.3: -0.03, 0.2: -0.05}
    >>> for size in sizes_to_try([0.5, 0.4, 0.3, 0.2], trials):
    ...     trials.append({"kept": size, "lower_bound": bounds[size], "accepted": bounds[size] >= -0.02})
    >>> [trial["kept"] for trial in trials]
    [0.5, 0.3, 0.4, 0.2]

    ```
    """
    place, step = 0, 1
    while place < len(sizes):
        yield sizes[place]
        if step == 2 and not trials[-1]["accepted"]:
            yield sizes[place - 1]
            step = 1
        else:
            step = 2 if trials[-1]["lower_bound"] >= 0 and place + 2 < len(sizes) else 1
        place += step


def _failure(trials: list[dict[str, Any]], tolerance: float) -> str:
    """Describe how far the best fraction missed the tolerance, and on which of several tasks."""
    best = max(trials, key=lambda trial: trial["lower_bound"])
    name, worst = min(best.get("tasks", {"": best}).items(), key=lambda item: item[1]["lower_bound"])
    where = f" of {name!r}" if name else ""
    return (
        f"No size meets tolerance={tolerance}: keeping {best['kept']:.1%} of the parameters already loses "
        f"{0 - worst['mean']:.4f} +- {worst['standard_error']:.4f} on {worst['count']:,} selection examples{where}, at "
        f"most {0 - worst['lower_bound']:.4f}. Increase `tolerance`, use more selection examples (a smaller error), or "
        "set `pruning_ratio`."
    )
