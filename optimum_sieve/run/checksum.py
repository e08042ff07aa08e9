"""Checksums in the files of a work directory, which notice any content altered after it was saved. Without torch.

A safetensors file has its name and the SHA-256 of all its other bytes in its metadata. JSON content has its SHA-256 as
one more key.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, BinaryIO


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_KEY, _NAME = "sha256", "file"
_FIELD = f'"{_KEY}":"'.encode()
_CHUNK = 2**20
# The format's own limit.
_MOST_HEADER_BYTES = 100_000_000


def unsealed_metadata(name: str) -> dict[str, str]:
    """Return metadata of a file with a name, which `seal_file` completes. The zeros count as such in the checksum."""
    return {_KEY: "0" * 64, _NAME: name}


def seal_file(path: Path) -> None:
    """Write the checksum of a safetensors file into its metadata, which must contain `unsealed_metadata`."""
    digest, place = _digest(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def is_sealed(path: Path) -> bool:
    """Return whether a safetensors file has a checksum; those of earlier versions have none."""
    with path.open("rb") as file:
        return _FIELD in _header(file)


def check_file(path: Path, name: str | None = None) -> None:
    """Read a whole safetensors file, but keep nothing of it in memory, and compare it with its checksum.

    Args:
        path (`Path`): The file.
        name (`str`, *optional*): The name that it was saved under. Default: any.

    Raises:
        ValueError: If the content was altered, is that of another file, or has no checksum.
        OSError: If the file cannot be read.
    """
    digest, place = _digest(path)
    with path.open("rb") as file:
        file.seek(place)
        if file.read(len(digest)) != digest.encode():
            raise ValueError("content that was altered after it was saved")
        file.seek(0)
        saved = json.loads(_header(file)[8:])["__metadata__"].get(_NAME)
        if name not in (None, saved):
            raise ValueError(f"the content of {saved}")


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON content with its checksum."""
    return {**content, _KEY: json_digest(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON content without its checksum.

    Raises:
        ValueError: If the content was altered, or has no checksum.
    """
    plain = {key: value for key, value in content.items() if key != _KEY}
    if content.get(_KEY) != json_digest(plain):
        raise ValueError("content that was altered after it was saved")
    return plain


def json_digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _header(file: BinaryIO) -> bytes:
    """Read the length and the header at the start of a safetensors file."""
    length = file.read(8)
    return length + file.read(min(int.from_bytes(length, "little"), _MOST_HEADER_BYTES))


def _digest(path: Path) -> tuple[str, int]:
    """Return the checksum of a file with zeros in place of its stored checksum, and the place of that."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        header = _header(file)
        place = header.find(_FIELD) + len(_FIELD)
        if place < len(_FIELD):
            raise ValueError("a file without a checksum")
        digest.update(header[:place] + b"0" * 64 + header[place + 64 :])
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest(), place
