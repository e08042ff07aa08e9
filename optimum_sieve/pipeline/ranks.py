"""The choice of every target's rank: by the size asked for, or by search within the tolerance on every task."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from optimum_sieve.allocation.stage import allocate_ranks
from optimum_sieve.allocation.tolerance import search_kept_fraction
from optimum_sieve.evaluation.comparison import compare
from optimum_sieve.evaluation.stage import score, score_dense
from optimum_sieve.run.context import BASIS_SETTINGS
from optimum_sieve.search.stage import run_search
from optimum_sieve.surgery.live import LiveRanks


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from optimum_sieve.allocation.budget import Ranks
    from optimum_sieve.evaluation.comparison import Comparison
    from optimum_sieve.evaluation.scores import Evaluation
    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.healing.stage import Healer
    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.tasks import Example


logger = logging.getLogger(__name__)


def choose_ranks(
    run: Run,
    bases: Mapping[str, FactorBasis],
    healer: Healer | None = None,
) -> tuple[Ranks, list[dict[str, Any]]]:
    """Choose every target's rank, by `pruning_ratio` or by search within `tolerance`.

    Args:
        run (`Run`): The run.
        bases (`Mapping[str, FactorBasis]`): A basis of every target.
        healer (`Healer`, *optional*): Heals every size that is tried; the examples it has not seen decide.

    Returns:
        `tuple[dict, list[dict]]`: Ranks by name (`None` = dense), and what the search tried.

    Raises:
        RuntimeError: If the search found nothing within the tolerance.
    """
    config = run.config
    if config.allocation == "genetic":
        result = run_search(run, bases)
        return result["ranks"], result["candidates"]
    if config.pruning_ratio is not None:
        return allocate_ranks(run, bases, 1 - config.pruning_ratio), []
    deciding = _deciding(run, healer)
    dense = [score_dense(run, *each) for each in deciding]
    for task, found in zip(run.tasks, dense, strict=True):
        warn_of_the_majority(task, found)
    names = (*BASIS_SETTINGS, "rounds", "allocation", "storage", "rank_multiple", *(("heal",) if healer else ()))
    by_block = run.by_block and all(examples[0].generation is None for _, examples, _ in deciding)
    with LiveRanks(run.model, bases) as live:

        def compare_at(kept: float) -> dict[str, Comparison]:
            ranks = allocate_ranks(run, bases, kept)
            key: dict[str, Any] = {"ranks": ranks, "settings": run.key(*names)}
            if by_block:
                key["held"] = (bases, ranks)
            with _held(live, bases, ranks, healer, by_block=by_block):
                pruned = [
                    score(run, task, examples, f"kept {kept:.1%} on {part}", **key) for task, examples, part in deciding
                ]
            triples = zip(run.tasks, dense, pruned, strict=True)
            return {task.name: compare(before, after) for task, before, after in triples}

        kept, trials = search_kept_fraction(
            compare_at, tolerance=config.tolerance or 0.0, confidence=config.confidence, steps=config.search_steps
        )
    return allocate_ranks(run, bases, kept), trials


def _held(
    live: LiveRanks, bases: Mapping[str, FactorBasis], ranks: Ranks, healer: Healer | None, *, by_block: bool
) -> AbstractContextManager[object]:
    """Hold ranks in the model, healed where there is a healer; nothing where each block is to hold its own in turn."""
    if healer is not None:
        return healer.healed(bases, ranks)
    return nullcontext() if by_block else nullcontext(live.hold(ranks))


def _deciding(run: Run, healer: Healer | None) -> list[tuple[TaskRun, Sequence[Example], str]]:
    """Return each task with the selection examples that decide on a size, and what they are called."""
    if healer is None:
        return [(task, task.selection, "selection") for task in run.tasks]
    pairs = zip(run.tasks, healer.unseen, strict=True)
    return [(task, unseen, f"{len(unseen)} unmonitored examples of selection") for task, unseen in pairs]


def warn_of_the_majority(task: TaskRun, dense: Evaluation) -> None:
    """Warn where the dense model does no better on a task than one answer for all."""
    if dense.score <= dense.majority_score:
        logger.warning(
            "The dense model scores %.4f on the selection split of %r, always giving the most frequent answer %.4f: "
            "there is nothing to lose, and any size may pass. Improve the prompt, or take another model.",
            dense.score, task.name, dense.majority_score,
        )  # fmt: skip
