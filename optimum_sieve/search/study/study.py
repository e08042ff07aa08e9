r"""Candidates, scores and state of a search in an Optuna study, which any number of processes can share.

A candidate is a trial: its parameters are the levels, by module name; its values are the kept fraction and the score
difference; the rest of what is known of it lies in its user attributes. A candidate waits, is claimed by one process,
and ends complete, dropped (`PRUNED`) or, where its process died,
failed: then it is enqueued once more. `optuna-dashboard` shows all of it.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import threading
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from optimum_sieve.search.candidate import AnyOutcome, Candidate, read_outcome
from optimum_sieve.search.ranking.correction import Shares

from .processes import is_dead, this_process
from .storage import GRACE_SECONDS, HEARTBEAT_SECONDS, close_storage, open_storage, quiet


if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from optuna.trial import FrozenTrial

    from optimum_sieve.search.genome import Genome, SearchSpace


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_OPEN = (TrialState.WAITING, TrialState.RUNNING)
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


class SearchStudy:
    """The study of one search.

    Args:
        storage (`str`, *optional*): URL of an Optuna storage, such as `sqlite:///search.db` or
            `postgresql+psycopg://user@host/db`. `None`: in memory.
        name (`str`): Name of the study; it stands for everything the candidates' scores depend on.
        space (`SearchSpace`): The space.
        grace_seconds (`int`): Time without a sign of life after which a process counts as dead.

    Raises:
        ValueError: If the storage cannot be opened, or holds a study of this name in a newer format.
    """

    def __init__(
        self, storage: str | None, name: str, space: SearchSpace, *, grace_seconds: int = GRACE_SECONDS
    ) -> None:
        self.name = name
        self._space = space
        self._distributions: dict[str, BaseDistribution] = {
            gene.name: IntDistribution(0, gene.num_levels - 1) for gene in space.genes
        }
        self._names = [gene.name for gene in space.genes]
        self._grace_seconds = grace_seconds
        self._finished: dict[int, tuple[Any, Candidate]] = {}
        self._storage = open_storage(storage, grace_seconds)
        with quiet():
            self._study = optuna.create_study(
                storage=self._storage, study_name=name, directions=["minimize", "maximize"], load_if_exists=True
            )
            version = self._study.user_attrs.get("format_version", FORMAT_VERSION)
            if version > FORMAT_VERSION:
                raise ValueError(
                    f"`storage` must hold a study of format {FORMAT_VERSION} or older, got {version}: {name}. Upgrade "
                    "optimum-sieve."
                )
            if "format_version" not in self._study.user_attrs:
                self._study.set_metric_names(["kept fraction", "score difference"])
                self._study.set_user_attr("format_version", FORMAT_VERSION)

    def __enter__(self) -> SearchStudy:
        return self

    def __exit__(self, *details: object) -> None:
        close_storage(self._storage)

    @property
    def is_over(self) -> bool:
        """Whether the search has ended."""
        return bool(self._study.user_attrs.get("over", False))

    def end(self) -> None:
        """Note that the search has ended, which sends the workers home."""
        self._study.set_user_attr("over", True)

    def reopen(self) -> None:
        """Note that the search goes on."""
        if self.is_over:
            self._study.set_user_attr("over", False)

    @property
    def ending(self) -> list[Genome] | None:
        """What is confirmed, once breeding has ended."""
        found = self._study.user_attrs.get("ending")
        return None if found is None else [tuple(genome) for genome in found]

    @ending.setter
    def ending(self, genomes: list[Genome]) -> None:
        self._study.set_user_attr("ending", [list(genome) for genome in genomes])

    @property
    def shares(self) -> list[Shares]:
        """Shares of the loss that were measured, in order."""
        return [
            Shares(tuple(found["genome"]), tuple(found["values"])) for found in self._study.user_attrs.get("shares", [])
        ]

    @shares.setter
    def shares(self, measured: list[Shares]) -> None:
        self._study.set_user_attr("shares", [{"genome": m.genome, "values": m.values} for m in measured])

    def record_digest(self, name: str, digest: str) -> None:
        """Record the hash of what the candidates are made of, unless one is recorded; then check it."""
        if f"{name}_sha256" not in self._study.user_attrs:
            self._study.set_user_attr(f"{name}_sha256", digest)
        self.check_digest(name, digest)

    def check_digest(self, name: str, digest: str) -> None:
        """Refuse another hash than the recorded one.

        Raises:
            ValueError: If another hash was recorded.
        """
        known = self._study.user_attrs[f"{name}_sha256"]
        if known != digest:
            raise ValueError(
                f"`{name}` must be those the study was made with (SHA-256 {known[:12]}...), got {digest[:12]}.... Give "
                "every process the same work directory, or a copy of it."
            )

    def finished(self) -> list[Candidate]:
        """Return the scored candidates, by part, generation and slot."""
        for trial in self._study.get_trials(deepcopy=False, states=_FINISHED):
            if trial.number not in self._finished:
                self._finished[trial.number] = (trial.datetime_complete, self._candidate(trial))
        # Where two processes scored the same candidate, the first score counts for good.
        ordered = sorted(self._finished.items(), key=lambda item: (item[1][0], item[0]), reverse=True)
        distinct = {candidate.place: candidate for _, (_, candidate) in ordered}
        return [distinct[place] for place in sorted(distinct)]

    def enqueue(self, candidates: Iterable[Candidate]) -> None:
        """Add the candidates that are neither scored nor waiting nor being scored."""
        trials = self._study.get_trials(deepcopy=False, states=(*_OPEN, *_FINISHED))
        known = {_place(trial) for trial in trials}
        for candidate in candidates:
            if candidate.place not in known:
                self._study.add_trial(self._waiting_trial(candidate))

    def claim(self, places: Collection[tuple[str, int, int]] = ()) -> tuple[int, Candidate] | None:
        """Take a waiting candidate, which no other process gets then; return its trial's number too, or `None`.

        Args:
            places (`Collection[tuple]`): Take one of these only, where there are any.
        """
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        for trial in sorted(waiting, key=_place):
            if places and _place(trial) not in places:
                continue
            try:
                claimed = self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            except (optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
                continue
            own = this_process()
            if claimed:
                if isinstance(self._storage, optuna.storages.RDBStorage):
                    self._storage.record_heartbeat(trial._trial_id)
                self._storage.set_trial_user_attr(trial._trial_id, "process", own)
                # SQLite lets two processes claim at once; the last to leave its name keeps the candidate.
                if self._storage.get_trial(trial._trial_id).user_attrs.get("process") == own:
                    return trial.number, self._candidate(trial)
        return None

    @contextlib.contextmanager
    def alive(self, number: int) -> Iterator[None]:
        """Show, from a thread, that the process scoring a trial lives; however long a batch takes."""
        if not isinstance(self._storage, optuna.storages.RDBStorage):
            yield
            return
        identifier, storage, over = self._trial_id(number), self._storage, threading.Event()

        def beat() -> None:
            while True:
                storage.record_heartbeat(identifier)
                if over.wait(HEARTBEAT_SECONDS):
                    storage.remove_session()
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def record(self, number: int, candidate: Candidate, outcome: AnyOutcome) -> None:
        """End a trial with its scores; where another process ended it meanwhile, that counts."""
        identifier = self._trial_id(number)
        try:
            self._storage.set_trial_user_attr(identifier, "outcome", outcome.to_dict())
            values = [self._space.kept(candidate.genome), outcome.mean] if outcome.complete else None
            state = TrialState.COMPLETE if outcome.complete else TrialState.PRUNED
            self._storage.set_trial_state_values(identifier, state, values)
        except (optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
            logger.warning("Trial %d was ended by another process before its score came.", number)

    def release(self, number: int) -> None:
        """Give a claimed trial back, to be enqueued again."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_state_values(self._trial_id(number), TrialState.FAIL)

    def release_waiting(self) -> None:
        """Take back what nobody has claimed."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.release(trial.number)

    def release_dead(self) -> int:
        """Give back what dead processes had claimed: at once on this machine, elsewhere after the grace period."""
        released = 0
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            process = trial.user_attrs.get("process")
            if self._was_never_begun(trial) if process is None else is_dead(process):
                self.release(trial.number)
                released += 1
        with quiet():
            before = len(self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,)))
            optuna.storages.fail_stale_trials(self._study)
            released += len(self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,))) - before
        if released:
            logger.warning("%d candidates of processes that died are scored again.", released)
        return released

    def _was_never_begun(self, trial: FrozenTrial) -> bool:
        """Whether the process that claimed a trial died before it could leave its name."""
        start = trial.datetime_start
        return start is not None and (datetime.datetime.now() - start).total_seconds() > self._grace_seconds

    def _waiting_trial(self, candidate: Candidate) -> FrozenTrial:
        return create_trial(
            state=TrialState.WAITING,
            params=dict(zip(self._names, candidate.genome, strict=True)),
            distributions=self._distributions,
            user_attrs={
                "part": candidate.part,
                "generation": candidate.generation,
                "slot": candidate.slot,
                "origin": candidate.origin,
                "rival": candidate.rival,
                "allowances": candidate.allowances,
            },
        )

    def _candidate(self, trial: FrozenTrial) -> Candidate:
        attributes = trial.user_attrs
        genome = tuple(int(trial.params[name]) for name in self._names)
        self._space.check(genome)
        rival, outcome = attributes["rival"], attributes.get("outcome")
        return Candidate(
            genome=genome,
            part=attributes["part"],
            generation=attributes["generation"],
            slot=attributes["slot"],
            origin=attributes["origin"],
            rival=None if rival is None else (int(rival[0]), int(rival[1])),
            allowances=tuple(attributes["allowances"]),
            outcome=None if outcome is None else read_outcome(outcome),
        )

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)


def _place(trial: FrozenTrial) -> tuple[str, int, int]:
    attributes = trial.user_attrs
    return attributes["part"], attributes["generation"], attributes["slot"]
