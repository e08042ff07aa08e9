"""Score candidates that wait in a study: in the leader, or in a worker next to it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from optimum_sieve.run.bars import progress_bar

from .candidate import SEARCH


if TYPE_CHECKING:
    from collections.abc import Mapping

    from .loop import Search
    from .scoring.scorer import JointScorer
    from .study.study import SearchStudy

# Pause of a process that finds all candidates taken (seconds).
POLL_SECONDS = 0.2


def work(search: Search, study: SearchStudy, scorers: Mapping[str, JointScorer], *, progress: bool) -> int:
    """Score candidates of a study that another process leads, until that process ends it; return how many.

    Raises:
        RuntimeError: If the leader died and was not started again for a minute.
    """
    with progress_bar(desc="worker", unit="candidate", progress=progress) as bar:
        count, check_leader = 0, study.watch()
        while not study.is_over:
            if score_one(search, study, scorers):
                count += 1
                bar.update()
            else:
                check_leader()
                time.sleep(POLL_SECONDS)
    return count


def score_one(search: Search, study: SearchStudy, scorers: Mapping[str, JointScorer]) -> bool:
    """Score one waiting candidate, if there is any; after an error or an interrupt it returns to the queue."""
    claimed = study.claim()
    if claimed is None:
        return False
    number, candidate = claimed
    can_drop = candidate.part == SEARCH and search.goal.kept is None
    try:
        with study.alive(number):
            ranks = search.space.ranks(candidate.genome)
            outcome = scorers[candidate.part].score(ranks, tolerance=search.goal.tolerance if can_drop else None)
    except BaseException:
        study.release(number)
        raise
    study.record(number, candidate, outcome)
    return True
