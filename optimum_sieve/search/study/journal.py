"""A journal file of Optuna that survives full disks and killed processes. Does not import torch."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock


if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


class JournalError(Exception):
    """A journal cannot be written, or is damaged."""


class WholeLines(JournalFileBackend):
    """A journal that contains whole lines only.

    Optuna appends to the part of a line that a full disk or a killed process left, and can read nothing after it.

    Args:
        path (`Path`): The file; created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._writing = path, JournalFileSymlinkLock(str(path))
        super().__init__(str(path), self._writing)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append lines, all of them or none.

        Raises:
            JournalError: If the disk is full.
        """
        content = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        try:
            self._writing.acquire()
            try:
                self._append(content)
            finally:
                self._writing.release()
        except OSError as error:
            raise JournalError(str(error)) from error

    def _append(self, content: bytes) -> None:
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            end = _end_of_lines(descriptor)
            os.ftruncate(descriptor, end)
            os.lseek(descriptor, end, os.SEEK_SET)
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield the lines from a number on.

        Raises:
            JournalError: If one is damaged.
        """
        try:
            yield from super().read_logs(log_number_from)
        except (ValueError, OSError) as error:
            raise JournalError(f"a line that cannot be read: {error}") from error


def _end_of_lines(descriptor: int) -> int:
    """Return the position after the last whole line of a file."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return size
    return os.pread(descriptor, size, 0).rfind(b"\n") + 1
