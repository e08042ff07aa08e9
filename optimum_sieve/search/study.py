r"""Candidates, scores and state of a search in an Optuna study, which any number of processes can share.

A candidate is a trial: its parameters are the levels, by module name; its values are the kept fraction and the score
difference; the rest of what is known of it lies in its user attributes. A candidate waits, is claimed by one process
(the storage sees to it that only one succeeds), and ends complete, dropped (`PRUNED`) or, where its process died,
failed: then it is enqueued once more. `optuna-dashboard` shows all of it.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import platform
import warnings
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from .candidate import Candidate, Outcome


if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from optuna.trial import FrozenTrial

    from .genome import SearchSpace


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# A process shows that it lives once in the first time, and is given up after the second (seconds).
HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60
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
        self._finished: dict[int, Candidate] = {}
        self._storage = open_storage(storage, grace_seconds)
        with _quiet():
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

    def claim_digest(self, name: str, digest: str) -> None:
        """Record the hash of what the candidates are made of; refuse another one than was recorded before.

        Raises:
            ValueError: If another hash was recorded.
        """
        known = self._study.user_attrs.get(f"{name}_sha256")
        if known is None:
            self._study.set_user_attr(f"{name}_sha256", digest)
        elif known != digest:
            raise ValueError(
                f"`{name}` must be those the study was made with (SHA-256 {known[:12]}...), got {digest[:12]}.... Give "
                "every process the same work directory, or a copy of it."
            )

    def finished(self) -> list[Candidate]:
        """Return the scored candidates, by part, generation and slot."""
        for trial in self._study.get_trials(deepcopy=False, states=_FINISHED):
            if trial.number not in self._finished:
                self._finished[trial.number] = self._candidate(trial)
        distinct = {self._finished[number].place: self._finished[number] for number in sorted(self._finished)}
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
            if claimed:
                self._storage.set_trial_user_attr(trial._trial_id, "process", _process())
                self.show_life(trial.number)
                return trial.number, self._candidate(trial)
        return None

    def show_life(self, number: int) -> None:
        """Note that the process scoring a trial lives."""
        if isinstance(self._storage, optuna.storages.RDBStorage):
            self._storage.record_heartbeat(self._trial_id(number))

    def record(self, number: int, candidate: Candidate, outcome: Outcome) -> None:
        """End a trial with its scores; a trial that was given up meanwhile stays so, its twin counts."""
        identifier = self._trial_id(number)
        try:
            self._storage.set_trial_user_attr(identifier, "outcome", outcome.to_dict())
            values = [self._space.kept(candidate.genome), outcome.mean] if outcome.complete else None
            state = TrialState.COMPLETE if outcome.complete else TrialState.PRUNED
            self._storage.set_trial_state_values(identifier, state, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            logger.warning("Trial %d was given up before its score came; it is scored again.", number)

    def release(self, number: int) -> None:
        """Give a claimed trial back, to be enqueued again."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_state_values(self._trial_id(number), TrialState.FAIL)

    def release_dead(self) -> int:
        """Give back what dead processes had claimed: at once on this machine, elsewhere after the grace period."""
        released = 0
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            process = trial.user_attrs.get("process")
            if self._was_never_begun(trial) if process is None else _is_dead(process):
                self.release(trial.number)
                released += 1
        with _quiet():
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
                "allowance": candidate.allowance,
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
            allowance=attributes["allowance"],
            outcome=None if outcome is None else Outcome.from_dict(outcome),
        )

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)


def open_storage(url: str | None, grace_seconds: int = GRACE_SECONDS) -> optuna.storages.BaseStorage:
    """Open an Optuna storage by its URL; `journal:///path` is a journal file, `None` is memory.

    Raises:
        ValueError: If it cannot be opened; the message names the URL without its password.
    """
    if url is None:
        return optuna.storages.InMemoryStorage()
    try:
        with _quiet():
            if url.startswith("journal:///"):
                backend = JournalFileBackend(url.removeprefix("journal://"))
                return optuna.storages.JournalStorage(backend)
            return optuna.storages.RDBStorage(
                url, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=grace_seconds, engine_kwargs=_engine(url)
            )
    except Exception as error:
        raise ValueError(
            f"`storage` must be the URL of an Optuna storage, such as sqlite:///search.db, got {public_url(url)}: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}. Check that the server runs and its driver is "
            "installed."
        ) from error


def close_storage(storage: optuna.storages.BaseStorage) -> None:
    """Close the connections of a storage."""
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def _engine(url: str) -> dict[str, Any]:
    # Several processes write to one SQLite file: wait for the lock rather than fail.
    return {"connect_args": {"timeout": 100}} if url.startswith("sqlite") else {"pool_pre_ping": True}


def public_url(url: str) -> str:
    """Return `url` without a password, for messages and logs."""
    scheme, separator, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{credentials.partition(':')[0]}{at}{host}"


def _place(trial: FrozenTrial) -> tuple[str, int, int]:
    attributes = trial.user_attrs
    return attributes["part"], attributes["generation"], attributes["slot"]


def _process() -> list[Any]:
    return [platform.node(), os.getpid(), _start_time(os.getpid())]


def _start_time(pid: int) -> float | None:
    """When a process of this machine started; `None` if there is none. Tells a new process of an old number apart."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def _is_dead(process: list[Any]) -> bool:
    if process[0] != platform.node():
        return False
    return bool(_start_time(process[1]) != process[2])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's notes on experimental features, and its lines about the studies it makes, from the user."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
