"""A journal file of Optuna that survives full disks and killed processes. Does not import torch."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock


if TYPE_CHECKING:
    from collections.abc import Generator
    from io import FileIO
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
        with self._path.open("r+b", buffering=0) as file:
            end = _end_of_lines(file)
            file.truncate(end)
            file.seek(end)
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Yield the lines from a number on.

        Raises:
            JournalError: If one is damaged.
        """
        try:
            yield from super().read_logs(log_number_from)
        except (ValueError, OSError) as error:
            raise JournalError(f"a line that cannot be read: {error}") from error


def _end_of_lines(file: FileIO) -> int:
    """Return the position after the last whole line of a file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) in (b"", b"\n"):
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1
