"""The choice of every target's rank: for a given size, or for the smallest size within the tolerance on every task."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from optimum_sieve.allocation.stage import allocate_ranks
from optimum_sieve.allocation.tolerance import ToleranceError, search_kept_fraction
from optimum_sieve.evaluation.comparison import compare
from optimum_sieve.evaluation.stage import score, score_dense
from optimum_sieve.healing.stage import monitored_part
from optimum_sieve.run.context import WHOLE
from optimum_sieve.run.workdir import content_key
from optimum_sieve.search.stage import run_search
from optimum_sieve.surgery.live import LiveRanks
from optimum_sieve.vocabulary.stage import vocabulary_part


if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.calibration.rounds import Bases
    from optimum_sieve.evaluation.comparison import Comparison
    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.healing.stage import Healer
    from optimum_sieve.run.context import Run, TaskRun


logger = logging.getLogger(__name__)


def choose_ranks(run: Run, bases: Bases, healer: Healer | None = None) -> tuple[Ranks, list[dict[str, Any]]]:
    """Choose every target's rank for `pruning_ratio`, or search the smallest size within `tolerance`.

    Args:
        run (`Run`): The run.
        bases (`Bases`): The basis of every target.
        healer (`Healer`, *optional*): Heals every size that is tried; the selection examples that it does not monitor
            decide.

    Returns:
        `tuple[dict, list[dict]]`: Ranks by name (`None` = dense), and what the search tried.

    Raises:
        ToleranceError: If no size is within the tolerance; names the part of a reduced vocabulary in the loss.
    """
    config = run.config
    with run.timed("ranks"):
        if config.allocation != "genetic" and config.pruning_ratio is not None:
            return allocate_ranks(run, bases, 1 - config.pruning_ratio), []
        try:
            if config.allocation == "genetic":
                result = run_search(run, bases)
                return result["ranks"], result["candidates"]
            return _search_size(run, bases, healer)
        except ToleranceError as error:
            raise ToleranceError(f"{error}{vocabulary_part(run)}") from None


def _search_size(run: Run, bases: Bases, healer: Healer | None) -> tuple[Ranks, list[dict[str, Any]]]:
    """Bisect the kept fraction; return the ranks of the smallest size within the tolerance, and all sizes tried."""
    config = run.config
    deciding = [(task, _deciding_part(run, task, healer)) for task in run.tasks]
    dense = [score_dense(run, task, "selection", part) for task, part in deciding]
    for task, evaluation in zip(run.tasks, dense, strict=True):
        warn_of_the_majority(task, evaluation)
    by_block = run.by_block and all(task.selection[0].generation is None for task in run.tasks)
    with LiveRanks(run.model, bases) as live:

        def compare_at(kept: float) -> dict[str, Comparison]:
            ranks = allocate_ranks(run, bases, kept)
            pruned = content_key(bases=bases.key, ranks=ranks, healing=None if healer is None else healer.key)
            options: dict[str, Any] = {"label": f"kept {kept:.1%}", "pruned": pruned}
            if by_block:
                options["held"] = (bases, ranks)
            with _held(live, bases, ranks, healer, by_block=by_block):
                after = [score(run, task, "selection", part, **options) for task, part in deciding]
            return {task.name: compare(*pair) for task, *pair in zip(run.tasks, dense, after, strict=True)}

        kept, trials = search_kept_fraction(
            compare_at, tolerance=config.tolerance or 0.0, confidence=config.confidence, steps=config.search_steps
        )
    return allocate_ranks(run, bases, kept), trials


def _held(
    live: LiveRanks, bases: Bases, ranks: Ranks, healer: Healer | None, *, by_block: bool
) -> AbstractContextManager[object]:
    """Hold ranks in the model, healed if there is a healer. Block by block, the evaluation holds them itself."""
    if healer is not None:
        return healer.healed(bases, ranks)
    return nullcontext() if by_block else nullcontext(live.hold(ranks))


def _deciding_part(run: Run, task: TaskRun, healer: Healer | None) -> slice:
    """Return the part of a task's selection split that decides on a size: the examples that no healer monitors."""
    return WHOLE if healer is None else slice(monitored_part(run, task).stop, None)


def warn_of_the_majority(task: TaskRun, dense: Evaluation) -> None:
    """Warn if the dense model is no better on a task than always giving the most frequent answer."""
    if dense.score <= dense.majority_score:
        logger.warning(
            "The dense model scores %.4f on the selection split of %r, always giving the most frequent answer %.4f: "
            "there is nothing to lose, and any size may pass. Improve the prompt, or use another model.",
            dense.score, task.name, dense.majority_score,
        )  # fmt: skip
