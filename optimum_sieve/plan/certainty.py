"""What tolerance the selection examples of a run can show."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from optimum_sieve.allocation.certainty import examples_needed, least_tolerance, passing_probability
from optimum_sieve.config.rules import search_count


if TYPE_CHECKING:
    from collections.abc import Mapping

    from optimum_sieve.config.sieve import SieveConfig


logger = logging.getLogger(__name__)

# The plan begins each line with a title of so many characters.
_INDENT = "\n" + 23 * " "
# Agreement with the dense model that few useful sizes exceed. A run that is unlikely to pass even there is warned of.
_HIGH_AGREEMENT = 0.95


def describe_certainty(splits: Mapping[str, Mapping[str, int]], config: SieveConfig) -> dict[str, str]:
    """Say for each task what tolerance its selection examples can show; empty without a `tolerance`.

    Args:
        splits (`Mapping[str, Mapping[str, int]]`): Number of examples in each split of each task.
        config (`SieveConfig`): The settings.
    """
    return {name: _described(count, config.confidence) for name, count in _deciding_counts(splits, config).items()}


def _described(count: int, confidence: float) -> str:
    """Say in a few lines for a terminal what tolerance a number of examples can show."""

    def least(agreement: float, probability: float) -> str:
        shown = least_tolerance(count, agreement=agreement, confidence=confidence, probability=probability)
        return f"{shown:.3f}"

    def case(agreement: float) -> str:
        return f"  {least(agreement, 0.8)} in four of five runs, at {least(agreement, 0.5)} in half, where it "

    lines = [
        f"about {least(0.9, 0.8)}: {count:,} selection examples decide. "
        "A pruned model that loses nothing is accepted at",
        f"{case(0.9)}gives the dense model's answer to 90% of them",
        f"{case(0.8)}does so to 80%",
        "  A size is accepted only if the examples show it: for a smaller tolerance, add examples.",
    ]
    return _INDENT.join(lines)


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
        return {name: count - search_count(config.search_fraction, count) for name, count in counts.items()}
    return counts
