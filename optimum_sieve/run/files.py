"""Output files and directories: checked before any work, and written atomically."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def check_output(output: Path, overwrite: bool, needed_bytes: int = 0) -> None:
    """Check that the output directory is new or empty, writable and on a disk with enough room.

    Raises:
        FileExistsError: If it contains files and `overwrite` is false, or is a file.
        OSError: If it cannot be written or there is not enough room.
    """
    if output.is_file():
        raise FileExistsError(f"`output_dir` must be a directory, got the file {output}. Choose another name.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise FileExistsError(
            f"`output_dir` must be new or empty, got {output} which holds files. Choose another or pass --overwrite."
        )
    absolute = output.resolve()
    existing = next(parent for parent in absolute.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"`output_dir` must be in a directory that can be written, got {output}. Choose another one.")
    if os.path.ismount(absolute):
        raise OSError(
            f"`output_dir` must not be a mount point, which cannot be replaced as a whole, got {output}. Name a "
            "directory inside it."
        )
    free = shutil.disk_usage(existing).free
    if free < needed_bytes * 1.05:
        raise OSError(
            f"`output_dir` must have room for {needed_bytes / 1e9:.2f} GB, got {free / 1e9:.2f} GB free for {output}. "
            "Free some space or choose another disk."
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory as `path`; it replaces `path` unless an error is raised."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_directory(output: Path) -> Iterator[Path]:
    """Yield a temporary directory with the same parent as `output`; it replaces `output` unless an error is raised.

    Raises:
        OSError: If the disk is full or the directory cannot be written.
    """
    output = output.resolve()
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        yield partial
        _replace_directory(partial, output)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise OSError(
                f"`output_dir` must be writable and have room, got {output}: {error}. Nothing was written."
            ) from error
        raise


def _replace_directory(source: Path, target: Path) -> None:
    """Rename `source` to `target`; the previous `target` is removed only after that has succeeded."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    try:
        source.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
