"""What tolerance the selection examples of a run can show."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from optimum_sieve.allocation.certainty import examples_needed, least_tolerance, passing_probability


if TYPE_CHECKING:
    from collections.abc import Mapping

    from optimum_sieve.config.sieve import SieveConfig


logger = logging.getLogger(__name__)

# Agreement with the dense model that few useful sizes exceed. A run that is unlikely to pass even there is warned of.
_HIGH_AGREEMENT = 0.95


def describe_certainty(splits: Mapping[str, Mapping[str, int]], config: SieveConfig) -> dict[str, str]:
    """Say for each task what tolerance its selection examples can show; empty without a `tolerance`.

    Args:
        splits (`Mapping[str, Mapping[str, int]]`): Number of examples in each split of each task.
        config (`SieveConfig`): The settings.
    """
    texts = {}
    for name, count in _deciding_counts(splits, config).items():
        half, most = (
            " or ".join(
                f"{least_tolerance(count, agreement=share, confidence=config.confidence, probability=probability):.3f}"
                for share in (0.9, 0.8)
            )
            for probability in (0.5, 0.8)
        )
        texts[name] = (
            f"{half} (agreement .9 or .8): a model without any loss passes it in half of the runs, {most} in four of "
            f"five; {count:,} examples decide"
        )
    return texts


def warn_of_few_examples(splits: Mapping[str, Mapping[str, int]], config: SieveConfig) -> None:
    """Warn of tasks whose selection examples can hardly show the `tolerance`; the arguments are those above."""
    for name, count in _deciding_counts(splits, config).items():
        tolerance, confidence = config.tolerance or 0.0, config.confidence
        passing = passing_probability(tolerance, count, agreement=_HIGH_AGREEMENT, confidence=confidence)
        if passing < 0.5 and tolerance > 0:
            needed = examples_needed(tolerance, agreement=_HIGH_AGREEMENT, confidence=confidence)
            logger.warning(
                "tolerance=%g can hardly be shown on the %d selection examples of %r that decide: a pruned model "
                "without any loss that agrees with the dense one on %.0f %% passes in %.0f %% of the runs, with %d "
                "examples in half of them. Add selection examples or increase `tolerance`.",
                tolerance, count, name, 100 * _HIGH_AGREEMENT, 100 * passing, needed,
            )  # fmt: skip


def _deciding_counts(splits: Mapping[str, Mapping[str, int]], config: SieveConfig) -> dict[str, int]:
    """Return the number of selection examples that decide on each task, without those of a genetic search."""
    if config.tolerance is None:
        return {}
    counts = {name: counts["selection"] for name, counts in splits.items() if counts.get("selection", 0) > 1}
    if config.allocation == "genetic":
        return {name: count - config.search_count(count) for name, count in counts.items()}
    return counts
