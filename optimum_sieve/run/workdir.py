"""A work directory: results of finished stages, stored under the hash of their inputs so that a run resumes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from optimum_sieve.run import distributed

from .checksum import check_file, seal_file, unsealed_metadata
from .files import replacing
from .reservation import clear_directory
from .scratch import Scratch, remove_dead
from .signals import uninterrupted


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch


logger = logging.getLogger(__name__)


def content_key(**parts: Any) -> str:
    """Return a short hash of `parts`, which must be JSON types. Equal parts have equal keys in any process."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class WorkDir:
    """Results of stages as safetensors files, `<stage>-<key>.safetensors`. Without a path nothing is stored on disk.

    Args:
        path (`str | Path`, *optional*): The directory; created if it does not exist.

    Raises:
        FileExistsError: If `path` is a file.
        OSError: If it cannot be written.
    """

    def __init__(self, path: str | Path | None) -> None:
        if path == "":
            raise ValueError("`work_dir` must name a directory, got ''. Pass None to store nothing.")
        self.path = None if path is None else Path(path)
        # Without a path: what several stages of a run need.
        self._kept: dict[tuple[str, str], Any] = {}
        if self.path is not None:
            if self.path.is_file():
                raise FileExistsError(f"`work_dir` must be a directory, got the file {path}. Choose another name.")
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise OSError(f"`work_dir` must be a directory that can be written, got {path}. Choose another one.")
            remove_dead(self.path)
            with uninterrupted():
                clear_directory(self.path)

    @classmethod
    def temporary(cls) -> WorkDir:
        """Make a directory that is removed together with the object."""
        scratch = Scratch(None, "work") if distributed.is_first() else None
        work = cls(distributed.agree("" if scratch is None else str(scratch.path)))
        if scratch is not None:
            weakref.finalize(work, scratch.remove)
        return work

    def load(self, stage: str, key: str, *, verify: bool = True) -> dict[str, torch.Tensor] | None:
        """Return the tensors of a finished stage, or `None`; `verify` as in [`WorkDir.find`].

        Raises:
            ValueError: If the file is damaged or its content was altered; the message names it.
        """
        stored = self.load_with_record(stage, key, verify=verify)
        return None if stored is None else stored[0]

    def load_with_record(
        self, stage: str, key: str, *, verify: bool = True
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Return the tensors of a finished stage and their record, or `None`; `verify` as in [`WorkDir.find`].

        Raises:
            ValueError: If the file is damaged or its content was altered; the message names it.
        """
        if (kept := self.kept(stage, key)) is not None:
            return dict(kept), {}
        path = self.find(stage, key, verify=verify)
        if path is None:
            return None
        with _naming(path), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator protocol
            record = json.loads((file.metadata() or {}).get("record", "{}"))
        logger.info("Resumed the %s from %s.", stage, path)
        return tensors, record

    def remove(self, stage: str, key: str) -> None:
        """Remove the file of a stage, if there is one."""
        path = self.file(stage, key)
        if path is not None and distributed.is_first():
            path.unlink(missing_ok=True)

    def save(
        self, stage: str, key: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any] | None = None
    ) -> None:
        """Store the tensors of a stage and, as JSON in the same file, `record`. The write is atomic.

        Raises:
            OSError: If the disk is full or the directory cannot be written.
        """
        path = self.file(stage, key)
        if path is None:
            return
        if distributed.is_first():
            self._write(path, stage, tensors, record)
        distributed.wait()

    def remember(self, stage: str, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store tensors as `save` does or, without a path, in memory, as long as this object lives."""
        self.keep(stage, key, tensors)
        self.save(stage, key, tensors)

    def keep(self, stage: str, key: str, value: object) -> None:
        """Keep an object in memory, if there is no path, as long as this object lives."""
        if self.path is None:
            self._kept[stage, key] = value

    def kept(self, stage: str, key: str) -> Any:
        """Return what [`keep`][optimum_sieve.run.workdir.WorkDir.keep] kept, or `None`."""
        return self._kept.get((stage, key))

    def _write(
        self, path: Path, stage: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any] | None
    ) -> None:
        try:
            with replacing(path) as temporary:
                metadata = unsealed_metadata(path.name)
                metadata |= {} if record is None else {"record": json.dumps(record)}
                on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
                save_file(on_cpu, temporary, metadata=metadata)
                seal_file(temporary)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"`work_dir` must be writable and have room for the {stage}, got {self.path}: {error}. Finished stages "
                "are kept: make room and run again."
            ) from error

    def find(self, stage: str, key: str, *, verify: bool = True) -> Path | None:
        """Return the file of a finished stage, or `None`; the same in all processes of a run.

        Args:
            stage (`str`): Name of the stage.
            key (`str`): Hash of its inputs.
            verify (`bool`): Whether the first process reads the whole file and compares its checksum. A file that this
                run has just saved needs no check.

        Raises:
            ValueError: If the file is damaged or its content was altered; the message names it.
        """
        path = self.file(stage, key)
        if path is None:
            return None
        exists, damage = distributed.agree(_examine(path, verify) if distributed.is_first() else (False, ""))
        if damage:
            raise _damaged(path, damage)
        return path if exists else None

    def file(self, stage: str, key: str) -> Path | None:
        """Return the file of a stage, whether it exists or not; `None` without a path."""
        return None if self.path is None else self.path / f"{stage}-{key}.safetensors"


def _examine(path: Path, verify: bool) -> tuple[bool, str]:
    """Return whether a file exists and, if `verify` is set, how its content is damaged, in words; `""` if it is not."""
    exists = path.exists()
    if exists and not path.is_file():
        return True, "it is no regular file"
    if exists and verify:
        try:
            check_file(path, path.name)
        except (OSError, ValueError) as error:
            return True, str(error)
    return exists, ""


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise errors about the content of a file with its name and what to do about it."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"`{path}` must be a safetensors file as this package saved it, got {reason}. Delete it and run again."
    )


def flatten(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Turn objects with `tensors()` into one flat dictionary, `<name>|<field>`."""
    return {f"{name}|{field}": tensor for name, value in values.items() for field, tensor in value.tensors().items()}


def on_device(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Move tensors to `device`; those from files are on the CPU."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def unflatten(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Undo `flatten`, except for the class of the objects."""
    result: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, field = key.rsplit("|", 1)
        result.setdefault(name, {})[field] = tensor
    return result
