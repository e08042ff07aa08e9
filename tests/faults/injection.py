"""What befalls a process at its n-th change of the file system: a signal, a full disk, a slow disk.

An audit hook sees every file that Python opens for writing, and every rename, removal and new directory, whoever makes
it. Writes of compiled code (safetensors, SQLite) are not seen; a small file system and `largest_file` stand for them.
"""

from __future__ import annotations

import errno
import os
import random
import sys
import time
from typing import Any


_FIRST_PATH = {"os.mkdir", "os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate"}
# These need room on a disk, and so does a new file.
_GROWING = {"os.mkdir", "os.rename", "os.link", "os.symlink"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def install(kind: str, below: list[str], at: int = 0, number: int = 9, seconds: float = 0.0, log: str = "") -> None:
    """Count the changes of files below the directories `below`, and act.

    Args:
        kind: `count` (write each to `log`), `die` (send the signal `number` before the change `at`), `full` (no room
            from the change `at` on, of those that need room) or `slow` (wait up to `seconds` before each).
        below: Absolute paths of directories.
        at: From 1.
        number: A signal.
        seconds: Longest wait.
        log: A file.
    """
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if kind == "count" else -1
    rng = random.Random(os.getpid())
    count = 0

    def change(event: str, path: str, grows: bool) -> None:
        nonlocal count
        if kind == "full" and not grows:
            return
        count += 1
        if kind == "count":
            os.write(descriptor, f"{'grows' if grows else 'stays'} {event} {path}\n".encode())
        elif kind == "die" and count == at:
            os.kill(os.getpid(), number)
        elif kind == "full" and count >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        elif kind == "slow":
            time.sleep(rng.random() * seconds)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = _changed(event, arguments)
        if path is not None and any(path.startswith(directory + os.sep) for directory in below):
            new = event == "open" and (arguments[2] or 0) & os.O_CREAT
            change(event, path, bool(new) or event in _GROWING)

    sys.addaudithook(hook)
    synchronize = os.fsync

    def fsync(file: Any) -> None:
        change("os.fsync", "", grows=False)
        synchronize(file)

    os.fsync = fsync


def _changed(event: str, arguments: tuple[Any, ...]) -> str | None:
    """Return the path that an event changes, absolute."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str | bytes) or not (flags or 0) & _WRITING:
            return None
        directory = None
    elif event in _FIRST_PATH:
        path = arguments[0]
        directory = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else None
        if not isinstance(path, str | bytes | os.PathLike):
            return None
    else:
        return None
    text = os.fsdecode(path)
    if isinstance(directory, int) and directory >= 0:
        # Removing a tree names each file in an open directory.
        text = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), text)
    return os.path.abspath(text)
