"""Open Optuna storages by URL. Does not import torch."""

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

# Pause between a worker's checks whether the search has begun (seconds).
_WAIT_SECONDS = 1.0
# Attempts to open a database while another process makes its tables, and the pause between them (seconds).
_ATTEMPTS, _ATTEMPT_SECONDS = 10, 0.3
# Interval of a process's signs of life, and silence after which it counts as dead (seconds).
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
                return optuna.storages.JournalStorage(JournalFileBackend(url.removeprefix("journal://")))
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


def wait_for_study(url: str, name: str) -> None:
    """Return once a study exists and its digests are recorded; its leader makes it after the calibration."""
    is_logged = False
    while not _is_made(url, name):
        if not is_logged:
            logger.warning("Waiting for the search %s to begin in %s.", name, public_url(url))
            is_logged = True
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
