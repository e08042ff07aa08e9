"""Optuna storages by URL. Does not import torch."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError


if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

# How often a worker looks whether the search has begun (seconds).
_WAIT_SECONDS = 1.0
# How often a database is opened whose tables another process is making, and the pause between (seconds).
_ATTEMPTS, _ATTEMPT_SECONDS = 10, 0.3
# A process shows that it lives once in the first time, and is given up after the second (seconds).
HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60


def open_storage(url: str | None, grace_seconds: int = GRACE_SECONDS) -> optuna.storages.BaseStorage:
    """Open an Optuna storage by its URL; `journal:///path` is a journal file, `None` is memory.

    Raises:
        ValueError: If it cannot be opened; the message names the URL without its password.
    """
    if url is None:
        return optuna.storages.InMemoryStorage()
    try:
        with quiet():
            if url.startswith("journal:///"):
                backend = JournalFileBackend(url.removeprefix("journal://"))
                return optuna.storages.JournalStorage(backend)
            return _open_database(url, grace_seconds)
    except Exception as error:
        raise ValueError(
            f"`storage` must be the URL of an Optuna storage, such as sqlite:///search.db, got {public_url(url)}: "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}. Check that the server runs and that its "
            "driver is installed."
        ) from error


def _open_database(url: str, grace_seconds: int) -> optuna.storages.RDBStorage:
    """Open a database; where another process is making its tables at the same moment, open it again."""
    attempts = 0
    while True:
        attempts += 1
        try:
            return optuna.storages.RDBStorage(
                url, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=grace_seconds, engine_kwargs=_engine(url)
            )
        except DBAPIError as error:
            is_race = isinstance(error, IntegrityError) or "already exists" in str(error)
            if attempts == _ATTEMPTS or not is_race:
                raise
        time.sleep(_ATTEMPT_SECONDS)


def wait_for_study(url: str, name: str) -> None:
    """Return when a study exists and what it is made of is recorded; its leader makes it after the calibration."""
    is_said = False
    while not _is_made(url, name):
        if not is_said:
            logger.warning("Waiting for the search %s to begin in %s.", name, public_url(url))
            is_said = True
        time.sleep(_WAIT_SECONDS)


def _is_made(url: str, name: str) -> bool:
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        return False
    storage = open_storage(url)
    try:
        with quiet():
            study = optuna.load_study(storage=storage, study_name=name)
        return any(key.endswith("_sha256") for key in study.user_attrs)
    except KeyError:
        return False
    finally:
        close_storage(storage)


def close_storage(storage: optuna.storages.BaseStorage) -> None:
    """Close the connections of a storage."""
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def _engine(url: str) -> dict[str, Any]:
    # Several processes write to one SQLite file: wait for the lock rather than fail.
    return {"connect_args": {"timeout": 100}} if url.startswith("sqlite") else {"pool_pre_ping": True}


def public_url(url: str) -> str:
    """Return `url` without password and query, for messages and logs; the kind of storage alone if it is no URL."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return url.partition(":")[0] + ":..."
    shown = URL.create(parsed.drivername, parsed.username, None, parsed.host, parsed.port, parsed.database)
    return shown.render_as_string()


def holds_secret(url: str) -> bool:
    """Whether a URL holds more than `public_url` shows."""
    return public_url(url) != url


def absolute_url(url: str) -> str:
    """Return `url` such that it means the same file in any working directory."""
    prefix = "sqlite:///"
    if not url.startswith(prefix) or url == prefix:
        return url
    return prefix + str(Path(url.removeprefix(prefix)).resolve())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's notes on experimental features, and its lines about the studies it makes, from the user."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
