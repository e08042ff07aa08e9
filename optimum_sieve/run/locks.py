"""Locks on files, which the system releases when a process ends, even after `kill -9`. Does not import torch."""

from __future__ import annotations

import os
import sys


if sys.platform != "win32":
    import fcntl


# Name, or end of the name, of the files that this package locks.
LOCK = ".sieve-lock"
_NO_LINK: int = getattr(os, "O_NOFOLLOW", 0)


def open_lock(path: str | os.PathLike[str], *, create: int | None = None) -> int:
    """Open a file to lock it, but no symbolic link; return its descriptor.

    Args:
        path (`str | os.PathLike`): The file.
        create (`int`, *optional*): Mode bits of the file if it is made here. Default: it must exist.

    Raises:
        OSError: If it cannot be opened.
    """
    return os.open(path, os.O_RDWR | _NO_LINK | (0 if create is None else os.O_CREAT), create or 0)


def lock(descriptor: int, *, share: bool = False) -> None:
    """Lock an open file for this process alone, or for all that `share` it; never waits.

    Raises:
        BlockingIOError: If another process holds the lock.
        OSError: If the file system has no locks.
    """
    if sys.platform == "win32":
        raise OSError("There are no locks of this kind on Windows.")
    fcntl.flock(descriptor, (fcntl.LOCK_SH if share else fcntl.LOCK_EX) | fcntl.LOCK_NB)
