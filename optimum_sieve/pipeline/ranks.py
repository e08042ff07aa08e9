"""The choice of every target's rank: for a given size, or for the smallest size within the tolerance on every task."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from optimum_sieve.allocation.stage import allocate_ranks, kept_fraction
from optimum_sieve.allocation.tolerance import FINE, SMALLEST_KEPT, ToleranceError, search_kept_fraction
from optimum_sieve.evaluation.stage import compare_selection, score_reference
from optimum_sieve.run import distributed
from optimum_sieve.run.workdir import content_key
from optimum_sieve.search.stage import run_search
from optimum_sieve.surgery.live import LiveRanks
from optimum_sieve.vocabulary.stage import vocabulary_part

from .descent import descend_within
from .progress import show_trial


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.calibration.rounds import Bases
    from optimum_sieve.evaluation.comparison import Comparison
    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.healing.stage import Healer
    from optimum_sieve.run.context import Run


def choose_ranks(run: Run, bases: Bases, healer: Healer | None = None) -> tuple[Ranks, list[dict[str, Any]]]:
    """Choose every target's rank for `pruning_ratio`, or the smallest size within `tolerance`.

    A healer heals falling sizes below the one that holds without training; its `best` size is the result. The
    model is dense afterwards.

    Args:
        run (`Run`): The run.
        bases (`Bases`): The basis of every target.
        healer (`Healer`, *optional*): Heals falling sizes.

    Returns:
        `tuple[dict, list[dict]]`: Ranks by name (`None` = dense), and what was tried.

    Raises:
        ToleranceError: If no size is within the tolerance; names the part of a reduced vocabulary in the loss.
    """
    with run.timed("ranks"):
        reference = score_reference(run) if run.config.compares else ()
    ranks, trials, failure = _without_healing(run, bases, reference)
    if healer is not None:
        with run.timed("healing"):
            if run.config.tolerance is None:
                _heal_to_ratio(run, bases, ranks, healer)
            else:
                healer.kept_without = None if ranks is None else kept_fraction(run, ranks)
                trials += descend_within(run, bases, healer, reference, before=list(trials))
        if healer.best is not None:
            return healer.best.ranks([target.name for target in run.targets]), trials
    if ranks is None:
        raise ToleranceError(f"{failure}{vocabulary_part(run)}") from failure
    return ranks, trials


def _without_healing(
    run: Run, bases: Bases, reference: Sequence[Evaluation]
) -> tuple[Ranks | None, list[dict[str, Any]], ToleranceError | None]:
    """Choose the ranks of a model that is not trained: ranks (`None`: no size holds), what was tried, and the error."""
    config = run.config
    with run.timed("ranks"):
        if config.allocation != "genetic" and config.pruning_ratio is not None:
            return allocate_ranks(run, bases, 1 - config.pruning_ratio), [], None
        try:
            if config.allocation == "genetic":
                result = run_search(run, bases)
                return result["ranks"], result["candidates"], None
            return *_search_size(run, bases, reference), None
        except ToleranceError as error:
            return None, error.trials, error


def _heal_to_ratio(run: Run, bases: Bases, ranks: Ranks | None, healer: Healer) -> None:
    """Heal the size of `pruning_ratio`, and sizes on the way to it where its ranks are not given by a search."""
    sizes = run.config.healed_sizes
    healer.descend(bases, sizes, lambda size: True, first_ranks=ranks if len(sizes) == 1 else None)


def _search_size(run: Run, bases: Bases, reference: Sequence[Evaluation]) -> tuple[Ranks, list[dict[str, Any]]]:
    """Bisect the kept fraction; return the ranks of the smallest size within the tolerance, and all sizes tried."""
    config = run.config
    by_block = run.by_block and all(task.selection[0].generation is None for task in run.tasks)

    @cache
    def ranks_at(kept: float) -> Ranks:
        return allocate_ranks(run, bases, kept)

    def kept_by_ranks(kept: float) -> float:
        return kept_fraction(run, ranks_at(kept))

    with LiveRanks(run.model, bases) as live:

        def compare_at(kept: float) -> dict[str, Comparison]:
            ranks = ranks_at(kept)
            pruned = content_key(bases=bases.key, ranks=ranks)
            options: dict[str, Any] = {"label": f"kept {kept_by_ranks(kept):.1%}", "pruned": pruned}
            if by_block:
                options["held"] = (bases, ranks)
            else:
                live.hold(ranks)
            return compare_selection(run, reference, **options)

        kept, trials = search_kept_fraction(
            compare_at,
            tolerance=config.tolerance or 0.0,
            confidence=config.confidence,
            steps=config.search_steps,
            # Where a descent follows, it is enough to know where that starts.
            enough=SMALLEST_KEPT if config.heal is None else FINE,
            kept_by_ranks=kept_by_ranks,
            # Every process must go on or stop with the others.
            goes_on=lambda: distributed.agree(run.seconds_left > 0),
            on_trial=lambda trials: show_trial(run, trials),
        )
    return ranks_at(kept), trials
