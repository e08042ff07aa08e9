"""Run a search: one leader breeds and enqueues candidates, it and any number of workers score them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from optimum_sieve.allocation.tolerance import ToleranceError
from optimum_sieve.search.ranking.across_tasks import Standings
from optimum_sieve.search.ranking.correction import Shares, corrected, measure_shares

from .bottlenecks import bottleneck_candidates
from .breeding import fast, paper
from .candidate import CONFIRM, SEARCH, Candidate, Rival
from .confirm import confirmed, ladder, next_step


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from optimum_sieve.search.ranking.by_task import Goal
    from optimum_sieve.search.scoring.scorer import JointScorer
    from optimum_sieve.search.study.study import SearchStudy

    from .genome import Genome, SearchSpace
    from .presets import SearchPreset


logger = logging.getLogger(__name__)

# How often a process looks again where all candidates are taken (seconds).
_POLL_SECONDS = 0.2


@dataclass(eq=False, kw_only=True)
class Search:
    """What a search is made of; what comes next is a pure function of this and of the scored candidates.

    Args:
        space (`SearchSpace`): The space.
        preset (`SearchPreset`): Settings of the genetic algorithm.
        goal (`Goal`): What is searched.
        allocate (`Callable`): Maps an allocation's name and a kept fraction to a genome.
        seed (`int`): Seed of everything random.
        num_bottlenecks (`int`): Matrices of the result to lower one by one, at the end.
        ending (`list[Genome]`, *optional*): What `choose_ending` returned, once breeding has ended for good.
        shares (`list[Shares]`): What was measured at the points of `next_point`, in order.
    """

    space: SearchSpace
    preset: SearchPreset
    goal: Goal
    allocate: Callable[[str, float], Genome]
    seed: int
    num_bottlenecks: int = 0
    ending: list[Genome] | None = None
    shares: list[Shares] = field(default_factory=list)
    _generations: list[list[Candidate]] = field(default_factory=list)
    _spaces: dict[int, SearchSpace] = field(default_factory=dict)

    def open_candidates(self, scored: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates to score now, those of the generation or step in progress; none at the end.

        Args:
            scored (`Sequence[Candidate]`): All candidates with outcomes.
        """
        if self.ending is None:
            found = self._open_generation([candidate for candidate in scored if candidate.part == SEARCH])
            if found:
                return found
        if self.goal.kept is None:
            step = next_step(self._ending(scored), _tried(scored), self.goal)
            if step or confirmed(_tried(scored), self.goal) is None:
                return step
        if not self.num_bottlenecks:
            return []
        places = {candidate.place for candidate in scored}
        wanted = bottleneck_candidates(self.corrected, self.result(scored).genome, self.num_bottlenecks)
        return [candidate for candidate in wanted if candidate.place not in places]

    @property
    def corrected(self) -> SearchSpace:
        """The space with the predicted losses corrected by the shares measured so far."""
        return self._corrected(len(self.shares))

    def _corrected(self, number: int) -> SearchSpace:
        # Shares are only ever added, so a space stands for good, with the hulls it has worked out.
        if number not in self._spaces:
            self._spaces[number] = corrected(self.space, self.shares[:number])
        return self._spaces[number]

    def next_point(self, scored: Sequence[Candidate]) -> Genome | None:
        """Return where shares are to be measured before breeding goes on, if anywhere.

        First at the energy allocation that the seeds show to be at the limit, then at the best of a generation.
        """
        number = len(self.shares)
        if self.ending is not None or number >= min(self.preset.corrections, self.preset.generations - 1):
            return None
        searched = [candidate for candidate in scored if candidate.part == SEARCH]
        if self._open_generation(searched, last=number) or not self._generations[number]:
            return None
        if number:
            return self.best(searched).genome
        return self.allocate("energy", Standings(self.space, tuple(searched), self.goal).energy_size)

    def choose_ending(self, scored: Sequence[Candidate]) -> list[Genome]:
        """Return what to confirm: the best candidate at falling sizes or, where a size is given, the best itself."""
        best = self.best(scored)
        if self.goal.kept is not None:
            return [best.genome]
        size = self.space.kept(best.genome)
        if self.preset.guided:
            searched = tuple(candidate for candidate in scored if candidate.part == SEARCH)
            size = Standings(self.corrected, searched, self.goal).size(best)
        return ladder(self.corrected, best.genome, size)

    def _ending(self, scored: Sequence[Candidate]) -> list[Genome]:
        return self.choose_ending(scored) if self.ending is None else self.ending

    def _open_generation(self, searched: Sequence[Candidate], last: int | None = None) -> list[Candidate]:
        places, number = {candidate.place for candidate in searched}, 0
        while last is None or number <= last:
            if number == len(self._generations):
                history = [candidate for candidate in searched if candidate.generation < number]
                self._generations.append(self._breed(history, number))
            missing = [c for c in self._generations[number] if c.place not in places]
            if missing or not self._generations[number]:
                return missing
            number += 1
        return []

    def _breed(self, history: Sequence[Candidate], number: int) -> list[Candidate]:
        if self.preset.guided:
            # As many shares as were measured before this generation: a search that goes on breeds the same one.
            space = self._corrected(min(number, len(self.shares)))
            return fast.next_generation(space, self.preset, self.goal, history, self.allocate, self.seed)
        return paper.next_generation(self.space, self.preset, self.goal, history, self.seed)

    def best(self, scored: Sequence[Candidate]) -> Candidate:
        """Return the best candidate of the search part.

        Raises:
            RuntimeError: If none was scored to the end.
        """
        searched = [candidate for candidate in scored if candidate.part == SEARCH]
        if self.preset.guided:
            ranking = Standings(self.corrected, tuple(searched), self.goal).ranking if searched else []
        else:
            ranking = paper.rank(self.space, self.goal, [c for c in searched if c.outcome and c.outcome.complete])
        if not ranking:
            raise RuntimeError("The search must have scored at least one candidate to the end, got none. Run it again.")
        return ranking[0]

    def result(self, scored: Sequence[Candidate]) -> Candidate:
        """Return the candidate to use: the confirmed one or, where a size was given, the best.

        Raises:
            ToleranceError: If no size was confirmed.
            RuntimeError: If none was as small as asked.
        """
        if self.goal.kept is not None:
            wanted = self._ending(scored)[0]
            best = next(c for c in scored if c.part == SEARCH and c.genome == wanted)
            if self.space.kept(best.genome) > self.goal.kept:
                raise RuntimeError(
                    f"`pruning_ratio` must be within reach of the search, got {1 - self.goal.kept:.3f}: the smallest "
                    f"candidate keeps {self.space.kept(best.genome):.1%}. Use search_preset='fast' or more generations."
                )
            return best
        tried = _tried(scored)
        found = confirmed(tried, self.goal)
        if found is None:
            outcome = tried[0].outcome if tried else None
            tested = (
                f"keeping {self.space.kept(tried[0].genome):.1%} of the parameters costs {-outcome.mean:.4f} +- "
                f"{outcome.standard_error:.4f} on {outcome.worst.count} fresh examples"
                if outcome
                else "nothing was tested"
            )
            raise ToleranceError(
                f"`tolerance` must leave room for pruning, got {self.goal.tolerance}: {tested}. Accept a larger "
                "tolerance, use more selection examples (a smaller standard error), or set `pruning_ratio`."
            )
        return found


def _tried(scored: Sequence[Candidate]) -> list[Candidate]:
    return [candidate for candidate in scored if candidate.part == CONFIRM]


def lead(search: Search, study: SearchStudy, scorers: Mapping[str, JointScorer], *, progress: bool) -> list[Candidate]:
    """Run the search to its end, scoring along; `Ctrl-C` ends the breeding, and the best so far is confirmed.

    What is confirmed is written to the study before the first step, and never chosen again: neither a late score of a
    worker nor a restart changes it.

    Returns:
        `list[Candidate]`: All candidates with outcomes.
    """
    study.reopen()
    search.ending, search.shares = study.ending, study.shares
    with tqdm(desc="search", unit="candidate", disable=not progress) as bar:
        while True:
            try:
                scored = study.finished()
                point = search.next_point(scored)
                if point is not None:
                    search.shares = [*search.shares, measure_shares(search.space, scorers[SEARCH], point)]
                    study.shares = search.shares
                    continue
                wanted = search.open_candidates(scored)
                if search.ending is None and not any(candidate.part == SEARCH for candidate in wanted):
                    _end_breeding(search, study, scored)
                    continue
                # Nothing new while it waits for workers.
                if len(scored) != bar.n:
                    _show(bar, search, scored)
                if not wanted:
                    study.end()
                    return scored
                study.release_dead()
                study.enqueue(wanted)
                if not score_one(search, study, scorers, only=wanted):
                    time.sleep(_POLL_SECONDS)
            except KeyboardInterrupt:
                scored = study.finished()
                if search.ending is not None or not any(c.outcome and c.outcome.complete for c in scored):
                    raise
                logger.warning("Interrupted: the best candidate so far is confirmed. Interrupt again to stop.")
                _end_breeding(search, study, scored)
            except Exception:
                # Workers must not wait for what will not come.
                study.end()
                raise


def _end_breeding(search: Search, study: SearchStudy, scored: Sequence[Candidate]) -> None:
    search.ending = search.choose_ending(scored)
    study.ending = search.ending
    study.release_waiting()


def work(search: Search, study: SearchStudy, scorers: Mapping[str, JointScorer], *, progress: bool) -> int:
    """Score candidates of a study that another process leads, until that ends it; return how many."""
    count = 0
    with tqdm(desc="worker", unit="candidate", disable=not progress) as bar:
        while not study.is_over:
            if score_one(search, study, scorers):
                count += 1
                bar.update()
            else:
                time.sleep(_POLL_SECONDS)
    return count


def score_one(
    search: Search, study: SearchStudy, scorers: Mapping[str, JointScorer], only: Sequence[Candidate] = ()
) -> bool:
    """Score one waiting candidate, if there is any; one that fails or is interrupted goes back to the queue."""
    claimed = study.claim({candidate.place for candidate in only})
    if claimed is None:
        return False
    number, candidate = claimed
    is_search = candidate.part == SEARCH
    try:
        with study.alive(number):
            outcome = scorers[candidate.part].score(
                search.space.ranks(candidate.genome),
                tolerance=search.goal.tolerance if is_search and search.goal.kept is None else None,
                rivals=_rivals(study, candidate),
            )
    except BaseException:
        study.release(number)
        raise
    study.record(number, candidate, outcome)
    return True


def _rivals(study: SearchStudy, candidate: Candidate) -> list[Rival]:
    """Return what the candidate must keep up with on each task, if anything."""
    if candidate.rival is None:
        return []
    outcome = next(c.outcome for c in study.finished() if c.place == (candidate.part, *candidate.rival))
    assert outcome is not None
    pairs = zip(outcome.parts, candidate.allowances, strict=True)
    return [Rival(rises=own.rises, allowance=most) for own, most in pairs]


def _show(bar: tqdm, search: Search, scored: Sequence[Candidate]) -> None:
    bar.n = len(scored)
    searched = [candidate for candidate in scored if candidate.part == SEARCH]
    dropped = sum(1 for candidate in searched if candidate.outcome and not candidate.outcome.complete)
    parts = Counter(candidate.part for candidate in scored)
    texts: dict[str, object] = {"generation": max((c.generation for c in searched), default=0), "dropped": dropped}
    if len(searched) > dropped:
        texts["best kept"] = f"{search.space.kept(search.best(scored).genome):.1%}"
    if parts[CONFIRM]:
        texts["confirmation"] = f"step {parts[CONFIRM]}"
    bar.set_postfix(texts, refresh=True)
