"""Write files and directories as a whole or not at all: under a temporary name next to them, renamed once on the disk.

Both are safe from other runs and finish or remove the leftovers of dead runs (`reservation`). Does not import torch.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .outputs import is_standard_output, regular_file
from .reservation import NEW, OLD, exclusive, shared, temporary_directory


if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path of the same name; what is written there replaces `path` unless an error is raised.

    A link stays and the file it names is replaced. For `/dev/stdout` the content goes to the standard output.

    Raises:
        FileExistsError: If `path` is no regular file.
        OSError: If the directory cannot be written.
    """
    if is_standard_output(path):
        with tempfile.TemporaryDirectory(prefix="optimum-sieve-") as directory:
            temporary = Path(directory) / path.name
            yield temporary
            sys.stdout.write(temporary.read_text(encoding="utf-8"))
        return
    target = regular_file(path)
    with shared(target), temporary_directory(target) as directory:
        temporary = directory / target.name
        yield temporary
        _sync(temporary)
        if target.exists():
            shutil.copymode(target, temporary)
        temporary.replace(target)
        _sync_names(target.parent)


@contextmanager
def whole_directory(output: Path) -> Iterator[Path]:
    """Yield a path that does not exist yet; the directory made there replaces `output` unless an error is raised.

    Raises:
        OSError: If the disk is full, the directory cannot be written or another run writes it.
    """
    target = Path(os.path.realpath(output))
    with exclusive(target):
        try:
            with temporary_directory(target) as directory:
                yield directory / NEW
                _replace_directory(directory, target)
        except BaseException as error:
            # Errors of the system have a number, unlike those of transformers when it cannot load what was written. The
            # tokenizers library raises nothing more specific than `Exception`.
            is_system = isinstance(error, OSError) and error.errno is not None
            if is_system or type(error).__name__ == "SafetensorError" or type(error) is Exception:
                raise OSError(
                    f"`output_dir` must be writable and have room, got {output}: {error}. Nothing was written."
                ) from error
            raise


def _replace_directory(directory: Path, target: Path) -> None:
    """Rename the new content to `target`; its previous content is removed only after that has succeeded."""
    new = directory / NEW
    for folder, _, names in os.walk(new):
        for name in names:
            _sync(Path(folder) / name)
        _sync_names(Path(folder))
    if target.exists():
        shutil.copymode(target, new)
        target.rename(directory / OLD)
        _sync_names(directory)
    new.rename(target)
    _sync_names(target.parent)


def _sync(file: Path) -> None:
    """Put the content of a file on the disk, so that its new name never arrives there first."""
    with file.open("r+b") as content:
        os.fsync(content.fileno())


def _sync_names(directory: Path) -> None:
    """Put the names in a directory on the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
