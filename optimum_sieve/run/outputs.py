"""Rules for outputs, checked before any work: nothing that this package did not write is replaced. Without torch."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_sieve._messages import cut

from .contents import foreign_entry, is_predictions, is_report
from .reservation import ADDED_LENGTH, exclusive


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Inputs = Iterable[tuple[str, str | Path | None]]

_STANDARD_OUTPUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}
# Arguments whose paths the run itself makes.
_MADE = ("work_dir", "study_storage")
# Room in a path for the names of the files inside an output directory.
_INNER_LENGTH = 100


@contextmanager
def reserved(output: Path, overwrite: bool, *, needed_bytes: int = 0, inputs: Inputs = ()) -> Iterator[None]:
    """Check an output directory, and keep other runs from writing it until the context ends.

    A command enters it before any work; the function that writes enters it again.

    Args:
        output (`Path`): The directory.
        overwrite (`bool`): Whether to replace a directory that holds a model or a page.
        needed_bytes (`int`): Bytes that must be free on the disk.
        inputs (`Iterable[tuple[str, str | Path | None]]`): Names of arguments with their paths, from which the output
            must be apart. Names that do not exist are those of repositories on the Hub.

    Raises:
        FileExistsError: If it holds something that may not be replaced, or another run writes it.
        ValueError: If it is, contains or is inside an input, or is or contains the home directory.
        OSError: If it cannot be written or there is not enough room.
    """
    target = _check_place(output, needed_bytes, inputs)
    with exclusive(target) as is_first:
        if is_first:
            _check_content(target, output, overwrite)
        yield


def check_output(output: Path, overwrite: bool, *, needed_bytes: int = 0, inputs: Inputs = ()) -> None:
    """Check an output directory by the rules of [`reserved`], without keeping other runs from it."""
    _check_content(_check_place(output, needed_bytes, inputs), output, overwrite)


def check_report_file(
    file: Path, argument: str, *, inputs: Inputs = (), known: Callable[[Path], bool] = is_report
) -> None:
    """Check that a report can be written to `file`: a new one, one of this package, or the standard output.

    Args:
        file (`Path`): The file.
        argument (`str`): Its name in error messages.
        inputs (`Iterable[tuple[str, str | Path | None]]`): As of [`reserved`].
        known (`Callable`): Tells a file that may be replaced, such as a page.

    Raises:
        FileExistsError: If it is something that may not be replaced.
        FileNotFoundError: If its directory does not exist or cannot be written.
        ValueError: If it is an input or inside one.
    """
    if is_standard_output(file):
        return
    target = _check_file(file, argument, inputs)
    if target.exists() and target.stat().st_size and not known(target):
        raise FileExistsError(
            f"`{argument}` must name a new file or a report to replace, got {cut(str(file))} with another content. "
            "Choose another name."
        )


def check_predictions_file(file: Path, argument: str, overwrite: bool, *, inputs: Inputs = ()) -> Path:
    """Check that predictions can be written to `file`; return its absolute path without links.

    Args:
        file (`Path`): The file.
        argument (`str`): Its name in error messages.
        overwrite (`bool`): Whether to replace a file of predictions.
        inputs (`Iterable[tuple[str, str | Path | None]]`): As of [`reserved`].

    Raises:
        FileExistsError: If it exists and `overwrite` is false, or it holds something else.
        FileNotFoundError: If its directory does not exist or cannot be written.
        ValueError: If it is an input or inside one.
    """
    target = _check_file(file, argument, inputs)
    if target.exists() and target.stat().st_size:
        if not overwrite:
            raise FileExistsError(
                f"`{argument}` must name a new file, got {cut(str(file))}. Choose another or pass --overwrite."
            )
        if not is_predictions(target):
            raise FileExistsError(
                f"`{argument}` must hold nothing but predictions to be overwritten, got {cut(str(file))} with another "
                "content. Choose another name."
            )
    return target


def _check_file(file: Path, argument: str, inputs: Inputs) -> Path:
    """Check the place of an output file; return its absolute path without links."""
    target = regular_file(file, argument)
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise FileNotFoundError(
            f"`{argument}` must name a file in an existing, writable directory, got {cut(str(file))}. Create it."
        )
    _check_length(target, file, argument)
    _check_apart(target, file, argument, inputs)
    return target


def is_standard_output(file: Path) -> bool:
    """Return whether a name is that of the standard output, which is written through whatever it is."""
    return os.path.abspath(file) in _STANDARD_OUTPUT


def regular_file(file: Path, argument: str = "path") -> Path:
    """Return the absolute path of a file without links, which thus stay in place.

    Raises:
        FileExistsError: If it exists and is no regular file, such as a directory, a FIFO or a device.
        OSError: If the name is invalid.
    """
    target, kind = _resolved(file, argument)
    if kind not in (None, "file"):
        raise FileExistsError(f"`{argument}` must be a regular file, got the {kind} {cut(str(file))}. Choose another.")
    return target


def _resolved(path: Path, argument: str) -> tuple[Path, str | None]:
    """Return the absolute path without links and `..`, and what is there: `"file"`, `"directory"`, ... or `None`."""
    try:
        target = Path(os.path.realpath(path))
        return target, _KINDS.get(stat.S_IFMT(target.stat().st_mode), "special file")
    except (FileNotFoundError, NotADirectoryError):
        return target, None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"`{argument}` must be a valid path, got {cut(str(path))}: {reason}. Choose another.") from error


def check_directory(directory: Path, argument: str) -> Path:
    """Check that a directory can be written or made; return its absolute path without links.

    Raises:
        FileExistsError: If it is something else.
        OSError: If its name is invalid, or it cannot be written or made.
    """
    target, kind = _resolved(directory, argument)
    shown = cut(str(directory))
    if kind not in (None, "directory"):
        raise FileExistsError(f"`{argument}` must be a directory, got the {kind} {shown}. Choose another name.")
    _check_length(target, directory, argument)
    existing = _existing(target.parent if argument == "output_dir" else target)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"`{argument}` must be in a directory that can be written, got {shown}. Choose another one.")
    return target


def _check_place(output: Path, needed_bytes: int, inputs: Inputs) -> Path:
    """Check all but the content of an output directory; return its absolute path without links."""
    target = check_directory(output, "output_dir")
    _check_apart(target, output, "output_dir", inputs)
    shown = cut(str(output))
    if os.path.ismount(target):
        raise OSError(
            f"`output_dir` must not be a mount point, which cannot be replaced as a whole, got {shown}. Name a "
            "directory inside it."
        )
    free = shutil.disk_usage(_existing(target.parent)).free
    if free < needed_bytes * 1.05:
        raise OSError(
            f"`output_dir` must have room for {needed_bytes / 1e9:.2f} GB, got {free / 1e9:.2f} GB free for {shown}. "
            "Free some space or choose another disk."
        )
    return target


def _existing(path: Path) -> Path:
    """Return `path`, or its nearest parent that exists."""
    return next((parent for parent in (path, *path.parents) if parent.exists()), path)


def _check_length(target: Path, given: Path, argument: str) -> None:
    """Check that temporary names next to `target`, and names inside it, are not too long for the system."""
    length, whole = len(os.fsencode(target.name)), len(os.fsencode(target))
    longest, longest_path = _limit(target, "PC_NAME_MAX", 255), _limit(target, "PC_PATH_MAX", 4096)
    if length + ADDED_LENGTH > longest or whole + ADDED_LENGTH + _INNER_LENGTH > longest_path:
        raise OSError(
            f"`{argument}` must have a name of at most {longest - ADDED_LENGTH} bytes and a path of at most "
            f"{longest_path - ADDED_LENGTH - _INNER_LENGTH}, got {length} and {whole} in {cut(str(given))}. Shorten it."
        )


def _limit(target: Path, name: str, default: int) -> int:
    try:
        return os.pathconf(_existing(target.parent), name)
    except (AttributeError, OSError, ValueError):
        return default


def _check_apart(target: Path, given: Path, argument: str, inputs: Inputs) -> None:
    """Check that an output is no input, contains none and is inside none; also of the home and current directory."""
    for name, path in inputs:
        # A name may also be that of a repository on the Hub.
        if path is None or not (name in _MADE or os.path.exists(path)):
            continue
        other = Path(os.path.realpath(path))
        relation = _relation(target, other)
        if relation is not None:
            raise ValueError(
                f"`{argument}` must be apart from `{name}`, got {cut(str(given))}, which {relation} {cut(str(path))}. "
                "Choose another place."
            )
    kept = {"home": os.path.expanduser("~"), "current": os.curdir}
    for name, path in kept.items():
        if _relation(target, Path(os.path.realpath(path))) in ("is", "contains"):
            raise ValueError(
                f"`{argument}` must not be or contain the {name} directory, got {cut(str(given))}. Name a directory "
                "inside."
            )


def _relation(one: Path, other: Path) -> str | None:
    """Return what `one` does to `other`: `"is"`, `"contains"`, `"is inside"` or, without a relation, `None`."""
    if _is_same(one, other):
        return "is"
    if any(_is_same(one, parent) for parent in other.parents):
        return "contains"
    return "is inside" if any(_is_same(parent, other) for parent in one.parents) else None


def _is_same(one: Path, other: Path) -> bool:
    """Return whether two paths without links name one file: two mounts, or upper and lower case, may do so."""
    if one == other:
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


def _check_content(target: Path, output: Path, overwrite: bool) -> None:
    """Check that an output directory is new or empty, or may be replaced."""
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"`output_dir` must be new or empty, got {cut(str(output))} which holds files. Choose another or pass "
            "overwrite=True (`--overwrite`)."
        )
    foreign = foreign_entry(target)
    if foreign is not None:
        raise FileExistsError(
            "`output_dir` must hold nothing but a model of `save_pretrained` or a page of `sieve report` to be "
            f"overwritten, got {cut(str(output))} with {cut(foreign)!r}. Choose another directory."
        )
