"""Locks of outputs among processes, and the leftovers of dead runs next to an output. Does not import torch.

The lock of `out` is on the file `.out.sieve-lock` next to it. The system releases it when the process ends, even after
`kill -9`, so a temporary directory `.out.<random>.sieve-partial` that exists while nobody holds the lock is of a dead
run. No name contains a process id: two containers on one disk may have the same.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_sieve._messages import cut

from .contents import foreign_entry
from .locks import LOCK, lock, open_lock
from .signals import uninterrupted


if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

NEW, OLD = "new", "old"
_PARTIAL = ".sieve-partial"
# What the name of a temporary directory adds to that of the output: two dots, eight letters and the ending.
ADDED_LENGTH = 2 + 8 + len(_PARTIAL)
# The thread that holds each output: a command takes it at the start, and the function that writes takes it again.
_holders: dict[Path, int] = {}
_RETRY_SECONDS = 0.05


@contextmanager
def exclusive(target: Path) -> Iterator[bool]:
    """Keep other runs from writing the directory `target`, and finish or remove the leftovers of dead runs.

    Yields whether this is the outermost context: the thread that holds `target` may enter again. Missing parent
    directories are made, and removed again if they stay empty.

    Args:
        target (`Path`): Absolute path without links.

    Raises:
        FileExistsError: If another run holds it.
        OSError: If the parent directory cannot be written.
    """
    if _holders.get(target) == threading.get_ident():
        yield False
        return
    missing = [parent for parent in target.parents if not parent.exists()]
    descriptor = None
    try:
        with uninterrupted():
            descriptor = _reserve(target)
            _holders[target] = threading.get_ident()
            if descriptor is not None:
                _clear_leftovers(target)
        yield True
    finally:
        with uninterrupted():
            if _holders.get(target) == threading.get_ident():
                del _holders[target]
            _unlock(target, descriptor)
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()


def _reserve(target: Path) -> int | None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _lock(target)
    except BlockingIOError as error:
        raise FileExistsError(
            f"`output_dir` must be written by one run at a time, got {cut(str(target))}, which another run is writing. "
            "Wait for it or choose another directory."
        ) from error
    except OSError as error:
        raise OSError(
            f"`output_dir` must be in a directory that can be written, got {cut(str(target))}: "
            f"{error.strerror or error}. Choose another one."
        ) from error


@contextmanager
def shared(target: Path) -> Iterator[None]:
    """Write `target` while other processes may write it too; the last one wins. Remove the leftovers of dead runs.

    Waits, until a signal, while another process holds `target` for itself.
    """
    descriptor = None
    try:
        while True:
            # Signals are raised between two attempts.
            with uninterrupted(), suppress(BlockingIOError):
                _clear_unless_written(target)
                descriptor = _lock(target, share=True)
                break
            time.sleep(_RETRY_SECONDS)
        yield
    finally:
        with uninterrupted():
            _unlock(target, descriptor)


def clear_directory(directory: Path) -> None:
    """Remove the leftovers of dead runs of the files in a directory."""
    for path in list(directory.glob(f".*{LOCK}")):
        with suppress(OSError):
            _clear_unless_written(path.with_name(path.name[1:].removesuffix(LOCK)))


def _clear_unless_written(target: Path) -> None:
    with suppress(BlockingIOError):
        descriptor = _lock(target)
        if descriptor is not None:
            _clear_leftovers(target)
            _unlock(target, descriptor)


def _lock(target: Path, *, share: bool = False) -> int | None:
    """Open and lock the file next to `target`, for this process alone or for all that `share` it.

    Returns:
        `int`, *optional*: The descriptor; `None` on a file system without locks.

    Raises:
        BlockingIOError: If another process holds the lock.
        OSError: If the file cannot be written.
    """
    path = _lock_file(target)
    while True:
        descriptor = open_lock(path, create=0o666)
        try:
            lock(descriptor, share=share)
            with suppress(FileNotFoundError):
                # Whoever held the lock removes the file before it lets go.
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:
            # Windows removes no open file.
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        os.close(descriptor)


def _unlock(target: Path, descriptor: int | None) -> None:
    if descriptor is not None:
        with suppress(OSError):
            # Fails while others share the lock; the last one removes the file.
            lock(descriptor)
            _lock_file(target).unlink(missing_ok=True)
        os.close(descriptor)


def _lock_file(target: Path) -> Path:
    return target.with_name(f".{target.name}{LOCK}")


@contextmanager
def temporary_directory(target: Path) -> Iterator[Path]:
    """Yield a new directory next to `target`, to hold its next content as `new`; removed at the end.

    It can be read by its owner alone, but `new` gets the usual permissions.
    """
    directory = None
    try:
        with uninterrupted():
            directory = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent))
        yield directory
    finally:
        if directory is not None:
            with uninterrupted():
                settle(directory, target)


def _clear_leftovers(target: Path) -> None:
    """Settle the temporary directories of `target`; no living process uses them."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}{re.escape(_PARTIAL)}")
    for path in [path for path in target.parent.iterdir() if pattern.fullmatch(path.name) and not path.is_symlink()]:
        settle(path, target)


def settle(directory: Path, target: Path) -> None:
    """Remove a temporary directory, after it gave `target` what it lacks.

    The old content is moved into it only once the new content is complete. So if it holds the old one and `target` does
    not exist, the run ended between the two renames, and the new content becomes `target`. If the disk refuses that
    too, the directory stays, with both contents, and the next run tries again.
    """
    old = directory / OLD
    # A temporary file of `replacing` may have the same name.
    if old.is_dir():
        for content in (directory / NEW, old):
            if not target.exists():
                with suppress(OSError):
                    content.rename(target)
    if old.is_dir():
        if not target.exists():
            logger.warning("%s could not be replaced: its content is in %s until the next run to it.", target, old)
            return
        _keep_foreign(old, target)
    shutil.rmtree(directory, ignore_errors=True)


def _keep_foreign(old: Path, target: Path) -> None:
    """Move an old content to a visible name if somebody has written into it since it was checked."""
    foreign = foreign_entry(old)
    if foreign is not None:
        kept = target.with_name(old.parent.name.removeprefix(".").removesuffix(_PARTIAL))
        old.rename(kept)
        logger.warning(
            "%s held %s, which was not there at the start: its old content is now %s.", target, foreign, kept
        )
