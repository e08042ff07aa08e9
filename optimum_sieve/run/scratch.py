"""Private directories for what a run reads back itself: removed at its end, or by the next run if it died.

The process holds a lock on a file in its directory. The system releases the lock when the process ends, even after
`kill -9`, so a directory whose lock is free is of a dead run. Names are random: process ids repeat in containers that
share a disk. Does not import torch.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_sieve._messages import cut

from .locks import LOCK, lock, open_lock
from .signals import uninterrupted


if TYPE_CHECKING:
    from types import TracebackType

_NAME = re.compile(r"sieve-[a-z]+-[a-z0-9_]{8}")


class Scratch:
    """A directory that only this process and user can use. Ends with `remove`, with the object or with the process.

    Args:
        parent (`Path`, *optional*): Directory that contains it; created if it does not exist. Default: the system's
            directory for temporary files.
        purpose (`str`): Part of its name, lower-case letters.

    Raises:
        OSError: If `parent` cannot be written.
    """

    def __init__(self, parent: Path | None, purpose: str) -> None:
        argument, parent = ("TMPDIR", Path(tempfile.gettempdir())) if parent is None else ("work_dir", parent)
        with uninterrupted():
            try:
                parent.mkdir(parents=True, exist_ok=True)
                remove_dead(parent)
                self.path, descriptor = _make(parent, purpose)
            except OSError as error:
                raise OSError(
                    f"`{argument}` must be a directory that can be written, got {cut(str(parent))}: "
                    f"{error.strerror or error}. Choose another one."
                ) from error
            # Runs at the end of the interpreter too, hence after errors and signals that Python handles.
            self._remove = weakref.finalize(self, _end, self.path, descriptor, os.getpid())

    def remove(self) -> None:
        """Remove the directory with its content."""
        self._remove()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def remove_dead(parent: Path) -> None:
    """Remove the directories of dead runs from `parent`; those of living ones stay."""
    with os.scandir(parent) as entries:
        paths = [
            Path(entry.path) for entry in entries if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    for path in paths:
        # Missing in a directory that is not ours, or was made this moment. Another user's cannot be opened.
        with suppress(OSError):
            descriptor = open_lock(path / LOCK)
            if _locked(descriptor, without=False):
                shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)


def _make(parent: Path, purpose: str) -> tuple[Path, int]:
    """Make and lock a directory; return it and the descriptor of its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"sieve-{purpose}-", dir=parent))
        descriptor = open_lock(path / LOCK, create=0o600)
        # Another run may have taken the lock, and removed the directory, before this one could lock it.
        if _locked(descriptor, without=True) and os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)


def _locked(descriptor: int, *, without: bool) -> bool:
    """Lock a file and return whether that succeeded; `without`: the result on a file system without locks."""
    try:
        lock(descriptor)
    except BlockingIOError:
        return False
    except OSError:
        return without
    return True


def _end(path: Path, descriptor: int, process: int) -> None:
    # A forked process has copies of the finalizers.
    if os.getpid() == process:
        with uninterrupted():
            # Windows removes no open file.
            os.close(descriptor)
            shutil.rmtree(path, ignore_errors=True)
