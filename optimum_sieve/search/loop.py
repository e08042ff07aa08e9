"""Run a search: one leader breeds and enqueues candidates; the leader and any number of workers score them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.allocation.tolerance import ToleranceError
from optimum_sieve.run.bars import progress_bar
from optimum_sieve.run.events import emit
from optimum_sieve.run.signals import Terminated, uninterrupted

from .bottlenecks import bottleneck_candidates
from .breeding import fast, paper
from .candidate import BOTTLENECK, CONFIRM, SEARCH, Candidate, of_part
from .confirm import confirmed, ladder, next_step
from .correction import Shares, corrected, measure_shares
from .ranking import Ranking
from .worker import POLL_SECONDS, score_one


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

    from tqdm.auto import tqdm

    from .genome import Genome, SearchSpace
    from .presets import SearchPreset
    from .ranking import Goal
    from .scoring.scorer import JointScorer
    from .study.study import SearchStudy


logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Search:
    """Settings and state of a search; its next candidates are a pure function of this and of the scored candidates.

    Args:
        space (`SearchSpace`): The space.
        preset (`SearchPreset`): Settings of the genetic algorithm.
        goal (`Goal`): The goal.
        seed (`int`): Random seed.
        num_bottlenecks (`int`): Matrices of the result to lower one by one at the end.
        ending (`list[Genome]`, *optional*): Output of `choose_ending`, once breeding has ended for good.
        shares (`list[Shares]`): Shares measured at the points of `next_point`, in order.
    """

    space: SearchSpace
    preset: SearchPreset
    goal: Goal
    seed: int
    num_bottlenecks: int = 0
    ending: list[Genome] | None = None
    shares: list[Shares] = field(default_factory=list)
    _generations: dict[int, list[Candidate]] = field(default_factory=dict)
    _spaces: dict[int, SearchSpace] = field(default_factory=dict)

    def open_candidates(self, scored: Sequence[Candidate]) -> list[Candidate]:
        """Return the unscored candidates of the generation or step in progress; none at the end of either."""
        if self.ending is None:
            searched = of_part(scored, SEARCH)
            last = max((candidate.generation for candidate in searched), default=0)
            return self._missing(last, searched) or self._missing(last + 1, searched)
        if self.goal.kept is None:
            tested = of_part(scored, CONFIRM)
            step = next_step(self.ending, tested, self.goal)
            if step or confirmed(tested, self.goal) is None:
                return step
        if not self.num_bottlenecks:
            return []
        measured = {candidate.slot for candidate in of_part(scored, BOTTLENECK)}
        wanted = bottleneck_candidates(self.corrected, self.result(scored).genome, self.num_bottlenecks)
        return [candidate for candidate in wanted if candidate.slot not in measured]

    @property
    def corrected(self) -> SearchSpace:
        """The space with the predicted losses corrected by all shares measured so far."""
        return self._corrected(len(self.shares))

    def _corrected(self, count: int) -> SearchSpace:
        # Shares are only ever appended, so a space and its cached hulls stay valid.
        if count not in self._spaces:
            self._spaces[count] = corrected(self.space, self.shares[:count])
        return self._spaces[count]

    def next_point(self, scored: Sequence[Candidate]) -> Genome | None:
        """Return the genome at which to measure shares before breeding continues, if any.

        After the seeds this is the energy allocation at the limit, after later generations the best candidate.
        """
        count, searched = len(self.shares), of_part(scored, SEARCH)
        if self.ending is not None or count >= min(self.preset.corrections, self.preset.generations - 1):
            return None
        if all(candidate.generation < count for candidate in searched) or self._missing(count, searched):
            return None
        if count:
            return self.best(searched).genome
        return self.space.energy(Ranking(self.space, searched, self.goal).limit)

    def _missing(self, generation: int, searched: Sequence[Candidate]) -> list[Candidate]:
        """Return the unscored candidates of a generation; the generations before must be complete."""
        if generation not in self._generations:
            history = [candidate for candidate in searched if candidate.generation < generation]
            # As many corrections as when it was first bred, so that a resumed search breeds the same generation.
            space = self._corrected(min(generation, len(self.shares)))
            rng = np.random.default_rng([self.seed, generation])
            is_over = generation >= self.preset.generations
            genomes = [] if is_over else self._breeding.breed(self, space, history, rng)
            self._generations[generation] = [
                Candidate(genome=genome, part=SEARCH, generation=generation, slot=slot, origin=origin)
                for slot, (genome, origin) in enumerate(genomes)
            ]
        keys = {candidate.key for candidate in searched}
        return [candidate for candidate in self._generations[generation] if candidate.key not in keys]

    @property
    def _breeding(self) -> ModuleType:
        return paper if self.preset.name == "paper" else fast

    def best(self, scored: Sequence[Candidate]) -> Candidate:
        """Return the best candidate of the search part.

        Raises:
            RuntimeError: If none was scored to the end.
        """
        return self._best(scored)[0]

    def _best(self, scored: Sequence[Candidate]) -> tuple[Candidate, float]:
        searched = of_part(scored, SEARCH)
        if not any(candidate.is_complete for candidate in searched):
            raise RuntimeError("The search must have scored at least one candidate to the end, got none. Run it again.")
        best: tuple[Candidate, float] = self._breeding.best(self.corrected, searched, self.goal)
        return best

    def choose_ending(self, scored: Sequence[Candidate]) -> list[Genome]:
        """Return the genomes to confirm: the best candidate at falling sizes; for a given size, the best itself."""
        best, size = self._best(scored)
        return [best.genome] if self.goal.kept is not None else ladder(self.corrected, best.genome, size)

    def result(self, scored: Sequence[Candidate]) -> Candidate:
        """Return the result: the confirmed candidate or, for a given size, the best.

        Raises:
            ToleranceError: If no size was confirmed.
            RuntimeError: If no candidate has the size asked for.
        """
        if self.goal.kept is not None:
            best = next(c for c in of_part(scored, SEARCH) if self.ending and c.genome == self.ending[0])
            if self.space.kept(best.genome) > self.goal.kept:
                raise RuntimeError(
                    f"`pruning_ratio` must be within reach of the search, got {1 - self.goal.kept:.3f}: the smallest "
                    f"candidate keeps {self.space.kept(best.genome):.1%}. Use search_preset='fast' or more generations."
                )
            return best
        tested = of_part(scored, CONFIRM)
        held = confirmed(tested, self.goal)
        if held is None:
            raise ToleranceError(
                f"`tolerance` must leave room for pruning, got {self.goal.tolerance}: {self._failure(tested)}. Accept "
                "a larger tolerance, use more selection examples (a smaller standard error), or set `pruning_ratio`."
            )
        return held

    def _failure(self, tested: Sequence[Candidate]) -> str:
        if not tested or tested[0].outcome is None:
            return "nothing was tested"
        kept, outcome = self.space.kept(tested[0].genome), tested[0].outcome
        return (
            f"keeping {kept:.1%} of the parameters costs {-outcome.mean:.4f} +- {outcome.standard_error:.4f} on "
            f"{len(outcome.differences)} fresh examples"
        )


def lead(search: Search, study: SearchStudy, scorers: Mapping[str, JointScorer], *, progress: bool) -> list[Candidate]:
    """Run the search to its end, scoring along; `Ctrl-C` ends the breeding and confirms the best candidate so far.

    The genomes to confirm are written to the study before the first step and stay fixed: neither a late score of a
    worker nor a restart changes them. Only a second `Ctrl-C` before any of them was scored lets the next start breed
    on.

    Returns:
        `list[Candidate]`: All candidates with outcomes.
    """
    study.reopen()
    search.ending, search.shares = study.ending, study.shares
    is_ended_by_hand = False
    # At most: it may end early, and the best ones are then confirmed.
    total = search.preset.population_size * search.preset.generations
    with progress_bar(total=total, desc="search", unit="candidate", progress=progress) as bar:
        while True:
            try:
                if (scored := _advance(search, study, scorers, bar)) is not None:
                    return scored
            except KeyboardInterrupt as end:
                _end_by_hand(search, study, end, again=is_ended_by_hand)
                is_ended_by_hand = True
            except Exception:
                # Workers must not wait for candidates that never come.
                study.abandon()
                raise


def _advance(
    search: Search, study: SearchStudy, scorers: Mapping[str, JointScorer], bar: tqdm
) -> list[Candidate] | None:
    """Take one step of a search; return all candidates after the last one."""
    scored = study.finished()
    if (point := search.next_point(scored)) is not None:
        search.shares = [*search.shares, measure_shares(search.space, scorers[SEARCH], point)]
        study.shares = search.shares
        return None
    wanted = search.open_candidates(scored)
    if search.ending is None and not wanted:
        _end_breeding(search, study, scored)
        return None
    # Nothing new while it waits for workers.
    if len(scored) != bar.n:
        _show(bar, search, scored)
    if not wanted:
        study.end()
        return scored
    study.release_dead()
    study.enqueue(wanted)
    if not score_one(search, study, scorers):
        time.sleep(POLL_SECONDS)
    return None


def _end_by_hand(search: Search, study: SearchStudy, interrupt: KeyboardInterrupt, *, again: bool) -> None:
    """End the breeding after Ctrl-C, or raise `interrupt` if that is not possible or was done before."""
    scored = study.finished()
    if search.ending is not None or not _can_end(interrupt, scored):
        if again:
            _breed_on(study)
        raise interrupt
    logger.warning("Interrupted: the best candidate so far is confirmed. Interrupt again to stop.")
    try:
        with uninterrupted():
            _end_breeding(search, study, scored)
    except KeyboardInterrupt:
        _breed_on(study)
        raise


def _can_end(interrupt: KeyboardInterrupt, scored: Sequence[Candidate]) -> bool:
    """Return whether Ctrl-C, but not SIGTERM, may end the breeding: only if something was scored."""
    return not isinstance(interrupt, Terminated) and any(candidate.is_complete for candidate in scored)


def _end_breeding(search: Search, study: SearchStudy, scored: Sequence[Candidate]) -> None:
    search.ending = search.choose_ending(scored)
    study.release_waiting()
    study.ending = search.ending


def _breed_on(study: SearchStudy) -> None:
    """Let the next start breed on, if nothing was confirmed yet."""
    with uninterrupted():
        if not of_part(study.finished(), CONFIRM):
            study.release_waiting()
            study.ending = None


def _show(bar: tqdm, search: Search, scored: Sequence[Candidate]) -> None:
    bar.n = len(scored)
    searched, tested = of_part(scored, SEARCH), of_part(scored, CONFIRM)
    dropped = sum(not candidate.is_complete for candidate in searched)
    texts: dict[str, object] = {"generation": max((c.generation for c in searched), default=0), "dropped": dropped}
    if len(searched) > dropped:
        kept = search.space.kept(search.best(scored).genome)
        texts["best kept"] = f"{kept:.1%}"
        emit("search", len(scored), kept=kept, dropped=dropped)
    if tested:
        texts["confirmation"] = f"step {len(tested)}"
    bar.set_postfix(texts, refresh=True)
