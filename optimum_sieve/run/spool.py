"""Tensors that a run reads back itself, such as the hidden states between blocks."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


if TYPE_CHECKING:
    from pathlib import Path


class Spool:
    """Tensors by name, in memory or in files.

    Args:
        directory (`Path`, *optional*): An empty directory for the files. Default: in memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._tensors: dict[str, torch.Tensor] = {}
        self._checksums: dict[str, int] = {}

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Store a tensor; replace one with the same name.

        Raises:
            OSError: If the disk is full.
        """
        if self._directory is None:
            self._tensors[name] = tensor.detach()
            return
        on_cpu = tensor.detach().contiguous().cpu()
        self._checksums[name] = _checksum(on_cpu)
        try:
            save_file({"tensor": on_cpu}, self._directory / name)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"`work_dir` must have room for the states between the blocks, got {self._directory.parent}: {error}. "
                "Finished stages are kept: make room and run again."
            ) from error

    def get(self, name: str, device: torch.device) -> torch.Tensor:
        """Return a tensor.

        Raises:
            KeyError: If there is no tensor with this name; FileNotFoundError if tensors are in files.
            ValueError: If the file was altered.
        """
        if self._directory is None:
            return self._tensors[name].to(device)
        tensor = load_file(self._directory / name)["tensor"]
        if _checksum(tensor) != self._checksums[name]:
            raise ValueError(
                f"`{self._directory / name}` must stay as this run wrote it, got other content. Check the disk and run "
                "again."
            )
        return tensor.to(device)

    def drop(self, name: str) -> None:
        """Delete a tensor if it exists."""
        if self._directory is None:
            self._tensors.pop(name, None)
        else:
            (self._directory / name).unlink(missing_ok=True)


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
