r"""Store candidates, scores and state of a search in an Optuna study, which any number of processes can share.

A candidate is a trial: its parameters are the levels, by module name; its values are the kept fraction and the score
difference; its user attributes hold the rest. A candidate waits, is claimed by one process, and ends complete, dropped
(`PRUNED`) or, if its process died, failed: then it is enqueued once more. `optuna-dashboard` shows all of it.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from optimum_sieve.run.checksum import json_digest, sealed, unsealed
from optimum_sieve.search.candidate import Candidate, Outcome
from optimum_sieve.search.correction import Shares

from .heartbeat import beating
from .leader import LeaderWatch
from .processes import is_dead, this_process
from .storage import GRACE_SECONDS, STORAGE_ERRORS, close_storage, naming_storage, open_storage, public_url, quiet


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from optuna.trial import FrozenTrial

    from optimum_sieve.search.genome import Genome, SearchSpace


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_KNOWN = (*_FINISHED, TrialState.WAITING, TrialState.RUNNING)
_ATTRIBUTES = ("part", "generation", "slot", "origin")


class SearchStudy:
    """The study of one search.

    Args:
        storage (`str`, *optional*): URL of an Optuna storage, such as `sqlite:///search.db` or
            `postgresql+psycopg://user@host/db`. `None`: in memory.
        name (`str`): Name of the study, derived from everything the candidates' scores depend on.
        space (`SearchSpace`): The space.
        grace_seconds (`int`): Silence after which a process counts as dead.

    Raises:
        ValueError: If the storage cannot be opened, or holds a study of this name in a newer format.
    """

    def __init__(
        self, storage: str | None, name: str, space: SearchSpace, *, grace_seconds: int = GRACE_SECONDS
    ) -> None:
        self.name = name
        self.where = public_url(storage or "memory")
        self._space = space
        self._distributions: dict[str, BaseDistribution] = {
            gene.name: IntDistribution(0, len(gene.ranks) - 1) for gene in space.genes
        }
        self._grace_seconds = grace_seconds
        self._finished: dict[int, tuple[Any, Candidate]] = {}
        self._storage = open_storage(storage, grace_seconds)
        with naming_storage(storage), quiet():
            self._study = optuna.create_study(
                storage=self._storage, study_name=name, directions=["minimize", "maximize"], load_if_exists=True
            )
            version = self._study.user_attrs.get("format_version", 0)
            if version > FORMAT_VERSION:
                raise ValueError(
                    f"`storage` must hold a study of format {FORMAT_VERSION} or older, got {version}: {name}. Upgrade "
                    "optimum-sieve."
                )
            if not version:
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
        """Record that the search has ended, which stops the workers."""
        self._study.set_user_attr("over", True)

    def abandon(self) -> None:
        """End the search after an error, if the storage can still be written."""
        with contextlib.suppress(*STORAGE_ERRORS):
            self.end()

    def watch(self) -> Callable[[], None]:
        """Return what a worker calls while it waits: it raises a `RuntimeError` once the leader is dead."""
        watch = LeaderWatch(self.where)
        return lambda: watch.check(self._study.user_attrs)

    def reopen(self) -> None:
        """Record that the search continues."""
        if self.is_over:
            self._study.set_user_attr("over", False)

    @property
    def ending(self) -> list[Genome] | None:
        """Genomes to confirm, once breeding has ended."""
        genomes = self._stored("ending")
        return None if genomes is None else [tuple(genome) for genome in genomes]

    @ending.setter
    def ending(self, genomes: list[Genome] | None) -> None:
        self._store("ending", None if genomes is None else [list(genome) for genome in genomes])

    @property
    def shares(self) -> list[Shares]:
        """Measured shares of the loss, in order."""
        rows = self._stored("shares")
        return [Shares(tuple(row["genome"]), tuple(row["values"])) for row in rows or ()]

    @shares.setter
    def shares(self, measured: list[Shares]) -> None:
        self._store("shares", [vars(shares) for shares in measured])

    def _stored(self, name: str) -> Any:
        """Return a value of the study, checked; `None` if there is none."""
        content = self._study.user_attrs.get(name)
        with self._naming(f"{name!r}"):
            return None if content is None else unsealed(content)["value"]

    def _store(self, name: str, value: Any) -> None:
        self._study.set_user_attr(name, sealed({"value": value}))

    @contextlib.contextmanager
    def _naming(self, part: str) -> Iterator[None]:
        """Raise errors about a part of the study with what to do about them."""
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`study_storage` must hold the study {self.name} as this package stored it, got {error!r} in {part} "
                f"in {self.where}. Delete the study or its file, and search again."
            ) from error

    def record_digest(self, name: str, digest: str) -> None:
        """Record a hash of the candidates' inputs; raise `ValueError` if another one was recorded before."""
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
        for trial in self._trials(*_FINISHED):
            if trial.number not in self._finished:
                self._finished[trial.number] = (trial.datetime_complete, self._candidate(trial))
        # If two processes scored the same candidate, the first score counts for good.
        latest_first = sorted(self._finished.items(), key=lambda item: (item[1][0], item[0]), reverse=True)
        distinct = {candidate.key: candidate for _, (_, candidate) in latest_first}
        return [distinct[key] for key in sorted(distinct)]

    def enqueue(self, candidates: Iterable[Candidate]) -> None:
        """Add the candidates that are not scored, waiting or being scored."""
        known = {self._key(trial) for trial in self._trials(*_KNOWN)}
        for candidate in candidates:
            if candidate.key not in known:
                levels = dict(zip(self._distributions, candidate.genome, strict=True))
                attributes = {name: getattr(candidate, name) for name in _ATTRIBUTES}
                attributes["sha256"] = _digest(candidate)
                self._study.add_trial(
                    create_trial(
                        state=TrialState.WAITING,
                        params=levels,
                        distributions=self._distributions,
                        user_attrs=attributes,
                    )
                )

    def claim(self) -> tuple[int, Candidate] | None:
        """Take a waiting candidate for this process alone; return its trial number and itself, or `None`."""
        process = this_process()
        for trial in sorted(self._trials(TrialState.WAITING), key=self._key):
            try:
                # A process that dies right after the claim is known to be dead. Another name than "process", which the
                # process that claimed a trial must find as it wrote it.
                self._storage.set_trial_user_attr(trial._trial_id, "claiming", process)
                claimed = self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
            except (optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
                continue
            if claimed:
                if isinstance(self._storage, optuna.storages.RDBStorage):
                    self._storage.record_heartbeat(trial._trial_id)
                try:
                    self._storage.set_trial_user_attr(trial._trial_id, "process", process)
                except (optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
                    # A leader that was started again gave it up, or another process scored it, in between.
                    continue
                # SQLite lets two processes claim at once; the last to write its identity keeps the candidate.
                if self._storage.get_trial(trial._trial_id).user_attrs.get("process") == process:
                    return trial.number, self._candidate(trial)
        return None

    @contextlib.contextmanager
    def alive(self, number: int) -> Iterator[None]:
        """Send signs of life from a thread while a trial is scored, however long a batch takes."""
        if not isinstance(self._storage, optuna.storages.RDBStorage):
            yield
            return
        identifier, storage = self._trial_id(number), self._storage
        with beating(lambda count: storage.record_heartbeat(identifier), storage.remove_session):
            yield

    def record(self, number: int, candidate: Candidate, outcome: Outcome) -> None:
        """End a trial with its scores; if another process ended it meanwhile, those scores count."""
        identifier = self._trial_id(number)
        try:
            scores = outcome.to_dict()
            self._storage.set_trial_user_attr(identifier, "outcome", scores)
            self._storage.set_trial_user_attr(identifier, "outcome_sha256", _digest(candidate, scores))
            values = [self._space.kept(candidate.genome), outcome.mean] if outcome.complete else None
            state = TrialState.COMPLETE if outcome.complete else TrialState.PRUNED
            self._storage.set_trial_state_values(identifier, state, values)
        except (optuna.exceptions.UpdateFinishedTrialError, RuntimeError):
            logger.warning("Trial %d was ended by another process before its score came.", number)

    def release(self, number: int) -> None:
        """Give a trial up, so that its candidate can be enqueued again. If the storage fails it is stale later."""
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, *STORAGE_ERRORS):
            self._storage.set_trial_state_values(self._trial_id(number), TrialState.FAIL)

    def release_waiting(self) -> None:
        """Give up all trials that nobody has claimed."""
        for trial in self._trials(TrialState.WAITING):
            self.release(trial.number)

    def release_dead(self) -> int:
        """Give up the trials of dead processes: at once on this machine, elsewhere after the grace period."""
        before = len(self._trials(TrialState.FAIL))
        for trial in self._trials(TrialState.RUNNING):
            attributes = trial.user_attrs
            process = attributes.get("process", attributes.get("claiming"))
            is_lost = "process" not in attributes and self._was_never_begun(trial)
            if is_lost or (process is not None and is_dead(process)):
                self.release(trial.number)
        with quiet():
            optuna.storages.fail_stale_trials(self._study)
        released = len(self._trials(TrialState.FAIL)) - before
        if released:
            logger.warning("%d candidates of processes that died are scored again.", released)
        return released

    def _was_never_begun(self, trial: FrozenTrial) -> bool:
        """Whether the process that claimed a trial died before it could write its identity."""
        start = trial.datetime_start
        return start is not None and (datetime.datetime.now() - start).total_seconds() > self._grace_seconds

    def _candidate(self, trial: FrozenTrial) -> Candidate:
        with self._naming(f"trial {trial.number}"):
            attributes = trial.user_attrs
            genome = tuple(int(trial.params[name]) for name in self._distributions)
            candidate = Candidate(genome=genome, **{name: attributes[name] for name in _ATTRIBUTES})
            outcome = attributes.get("outcome")
            stored = attributes.get("sha256" if outcome is None else "outcome_sha256")
            if stored != _digest(candidate, outcome):
                raise ValueError("content that was altered after it was stored")
            return candidate if outcome is None else replace(candidate, outcome=Outcome.from_dict(outcome))

    def _key(self, trial: FrozenTrial) -> tuple[str, int, int]:
        with self._naming(f"trial {trial.number}"):
            attributes = trial.user_attrs
            return attributes["part"], attributes["generation"], attributes["slot"]

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)


def _digest(candidate: Candidate, outcome: dict[str, Any] | None = None) -> str:
    """Return the SHA-256 of a candidate, and of its scores if it has any."""
    attributes = {name: getattr(candidate, name) for name in _ATTRIBUTES}
    return json_digest({"genome": list(candidate.genome), **attributes, "outcome": outcome})
