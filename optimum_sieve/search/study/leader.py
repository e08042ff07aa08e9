"""Signs of life of the process that leads a search, so that no worker waits for a dead one. Does not import torch."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from .heartbeat import beating
from .processes import is_dead, this_process
from .storage import GRACE_SECONDS, close_storage, open_storage, public_url, quiet


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


logger = logging.getLogger(__name__)

_LEADER = "leader"
# Attribute of the study in which a leader announced itself: its model has written the texts that the data lacks.
_WROTE = "wrote_texts"
# Pause between a worker's looks at a search that has not begun (seconds).
_WAIT_SECONDS = 1.0
# Longest time between the start of a leader and its first sign of life, in which it reads the model (seconds).
BEGIN_SECONDS = 600


@contextlib.contextmanager
def announced(url: str, name: str) -> Iterator[None]:
    """Create the study of a search, and write a sign of life of this process into it until the context ends."""
    storage = open_storage(url)
    try:
        with quiet():
            study = optuna.create_study(
                storage=storage, study_name=name, directions=["minimize", "maximize"], load_if_exists=True
            )
        with beating(lambda count: study.set_user_attr(_LEADER, [this_process(), count]), storage.remove_session):
            yield
    finally:
        close_storage(storage)


class LeaderWatch:
    """A worker's watch for the leader of its search, which may die and be started again within `GRACE_SECONDS`.

    It compares no clocks of different machines.

    Args:
        where (`str`): The storage, for the error.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._last: Any = None
        self._since = time.monotonic()

    def check(self, attributes: dict[str, Any] | None) -> None:
        """Look at the attributes of the study, `None` before it exists.

        Raises:
            RuntimeError: If there has been no sign of life for too long.
        """
        sign = (attributes or {}).get(_LEADER)
        if sign is not None and sign != self._last and not is_dead(sign[0]):
            self._last, self._since = sign, time.monotonic()
        grace = BEGIN_SECONDS if attributes is None else GRACE_SECONDS
        if time.monotonic() - self._since > grace:
            raise RuntimeError(
                f"`work_dir` must be that of a search that is running, got {grace:.0f} seconds without a sign of life "
                f"of its leader in {self._where}. Start the leader again with the same model, task, settings and "
                "library versions, and then its workers."
            )


def announce_texts(url: str, name: str) -> None:
    """Let workers know that the leader's model has written the texts that the data lacks, and stored the prompts."""
    storage = open_storage(url)
    try:
        with quiet():
            optuna.load_study(storage=storage, study_name=name).set_user_attr(_WROTE, True)
    finally:
        close_storage(storage)


def wait_for_texts(url: str, name: str, is_stored: Callable[[], bool]) -> None:
    """Return once `is_stored` says so, or the leader that announced itself under this name has called `announce_texts`.

    Raises:
        RuntimeError: If the leader gives no sign of life.
    """
    wait_for_leader(url, lambda: is_stored() or _WROTE in (_attributes(url, name) or ()), name)


def wait_for_study(url: str, name: str, announced_name: str | None = None) -> None:
    """Return once a study exists and its digests are recorded; its leader records them after the calibration.

    Args:
        url (`str`): The storage.
        name (`str`): The study.
        announced_name (`str`, *optional*): The study in which its leader announces itself before it knows `name`.

    Raises:
        RuntimeError: If the leader gives no sign of life.
    """

    def is_recorded() -> bool:
        return any(key.endswith("_sha256") for key in _attributes(url, name) or ())

    wait_for_leader(url, is_recorded, name, *([] if announced_name is None else [announced_name]))


def wait_for_leader(url: str, is_ready: Callable[[], bool], *names: str) -> None:
    """Return once `is_ready` says so, while the leader of a search gives signs of life.

    Args:
        url (`str`): The storage.
        is_ready (`Callable`): Asked about once a second.
        names (`str`): The studies in which the leader may announce itself, at least one, the latest first.

    Raises:
        RuntimeError: If it gives no sign of life.
    """
    watch, is_logged = LeaderWatch(public_url(url)), False
    while not is_ready():
        attributes = None
        for name in dict.fromkeys(names):
            attributes = attributes or _attributes(url, name)
        watch.check(attributes)
        if not is_logged:
            logger.warning("Waiting for the search %s to begin in %s.", names[0], public_url(url))
            is_logged = True
        time.sleep(_WAIT_SECONDS)


def _attributes(url: str, name: str) -> dict[str, Any] | None:
    """Return the attributes of a study, `None` if it does not exist."""
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        return None
    storage = open_storage(url)
    try:
        with quiet():
            return dict(optuna.load_study(storage=storage, study_name=name).user_attrs)
    except KeyError:
        return None
    finally:
        close_storage(storage)
