"""Open Optuna storages by URL. Does not import torch."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from optimum_sieve.run.reservation import shared, temporary_directory

from .journal import JournalError, WholeLines


if TYPE_CHECKING:
    from collections.abc import Iterator

# Attempts to open a database while another process makes its tables, and the pause between them (seconds).
_ATTEMPTS, _ATTEMPT_SECONDS = 10, 0.3
# Interval of a process's signs of life, and silence after which it counts as dead (seconds).
HEARTBEAT_SECONDS, GRACE_SECONDS = 10, 60
# Errors of reading and writing a storage.
STORAGE_ERRORS = (optuna.exceptions.StorageInternalError, SQLAlchemyError, JournalError)


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
                return optuna.storages.JournalStorage(WholeLines(Path(url.removeprefix("journal://"))))
            return _open_database(url, grace_seconds)
    except Exception as error:
        raise ValueError(
            f"`storage` must be the URL of an Optuna storage, such as sqlite:///search.db, got {public_url(url)}: "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}. Check that the server runs and that its "
            "driver is installed."
        ) from error


def _open_database(url: str, grace_seconds: int) -> optuna.storages.RDBStorage:
    # Several processes write to one SQLite file: wait for the lock rather than fail.
    engine: dict[str, Any] = {"connect_args": {"timeout": 100}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    options: dict[str, Any] = {"grace_period": grace_seconds, "engine_kwargs": engine}
    _make_tables(url)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return optuna.storages.RDBStorage(url, heartbeat_interval=HEARTBEAT_SECONDS, **options)
        except DBAPIError as error:
            # Another process may make the tables at the same moment.
            is_race = isinstance(error, IntegrityError) or "already exists" in str(error)
            if attempt == _ATTEMPTS or not is_race:
                raise
        time.sleep(_ATTEMPT_SECONDS)
    raise AssertionError("unreachable")


def _make_tables(url: str) -> None:
    """Make a new SQLite file under a temporary name, so that a killed process leaves none with a part of its tables.

    Without the index of the names, which Optuna makes last, there would be two studies of one name.
    """
    parsed = make_url(url)
    name = parsed.database or ":memory:"
    if parsed.get_backend_name() != "sqlite" or name.startswith((":memory:", "file:")) or Path(name).exists():
        return
    target = Path(name).resolve()
    with shared(target), temporary_directory(target) as directory:
        made = directory / target.name
        close_storage(optuna.storages.RDBStorage(parsed.set(database=str(made)).render_as_string(False)))
        try:
            os.link(made, target)
        except FileExistsError:
            # Another process was faster.
            return
        except OSError:
            # A file system without hard links.
            if not target.exists():
                made.rename(target)


@contextlib.contextmanager
def naming_storage(url: str | None) -> Iterator[None]:
    """Raise errors of a storage, such as those of a full disk, with its URL and what to do about them.

    Raises:
        OSError: In place of any of `STORAGE_ERRORS`.
    """
    try:
        yield
    except (*STORAGE_ERRORS, json.JSONDecodeError) as error:
        # Optuna and SQLAlchemy wrap the message of the database.
        cause = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
        reason = str(getattr(cause, "orig", None) or cause or error).splitlines()[0]
        raise OSError(
            f"`study_storage` must be writable and have room for the search, got {public_url(url or 'memory')}: "
            f"{reason[:300]}. Scored candidates are kept: make room, or repair the storage, and start the search again."
        ) from error


def close_storage(storage: optuna.storages.BaseStorage) -> None:
    """Close the connections of a storage."""
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def public_url(url: str) -> str:
    """Return `url` without password and query, for messages and logs; only its scheme if it is no valid URL."""
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
    """Return `url` with an absolute path, so that it names the same file in any working directory."""
    prefix = "sqlite:///"
    if not url.startswith(prefix) or url == prefix:
        return url
    return prefix + str(Path(url.removeprefix(prefix)).resolve())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress Optuna's warnings about experimental features and its messages about new studies."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
