"""Licence and languages of a base model, which every model made of it has too. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml


if TYPE_CHECKING:
    from collections.abc import Mapping

# Keys of a model card that hold for derived models.
_KEYS = ("license", "license_name", "license_link", "language")
_CARD = "README.md"
# Texts that licences ask to pass on, by the names that model makers give them.
_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "license*", "licence*", "notice*", "use_policy*")
# No licence has more bytes; such a file is something else.
_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Terms:
    """What a model card and a directory take over.

    Args:
        metadata (`Mapping[str, Any]`): `license`, `license_name`, `license_link` and `language`, as far as declared.
        files (`Mapping[str, str]`): Texts of the licence by the name of their file.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


NO_TERMS = Terms()


def read_terms(model: str | Path | None, revision: str | None = None) -> Terms:
    """Read the terms of a model from its card and its files; none of a model without, or that cannot be reached.

    Args:
        model (`str | Path`, *optional*): Directory or Hub id. From the Hub, these files are downloaded.
        revision (`str`, *optional*): Revision on the Hub.

    Returns:
        `Terms`: A `license_link` to a file that could not be read points to the file on the Hub.
    """
    folder = _folder(model, revision)
    if folder is None:
        return Terms()
    is_local = Path(str(model)).is_dir()
    paths = [path for path in sorted(folder.iterdir()) if not (is_local and path.is_symlink())]
    files = {path.name: text for path in paths if (text := _licence_text(path)) is not None}
    metadata = _metadata(folder / _CARD)
    link = metadata.get("license_link")
    if isinstance(link, str) and "://" not in link and link not in files:
        from huggingface_hub import hf_hub_url

        del metadata["license_link"]
        if not is_local:
            metadata["license_link"] = hf_hub_url(str(model), link.removeprefix("./"), revision=revision)
    return Terms(metadata, files)


def _folder(model: str | Path | None, revision: str | None) -> Path | None:
    """Return a directory with the card and the licence of a model, or `None` if they are not to be had."""
    if not model:
        return None
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=[_CARD, *_FILES]))
    except Exception:  # A directory that is gone, or no network, for which each client has errors of its own.
        return None


def _licence_text(path: Path) -> str | None:
    """Return the text of a licence's file; `None` of other files, and of those that cannot be read."""
    try:
        if not any(fnmatch(path.name, pattern) for pattern in _FILES) or not path.is_file():
            return None
        return path.read_text(encoding="utf-8", errors="replace") if path.stat().st_size <= _MOST_BYTES else None
    except OSError:
        return None


def _metadata(card: Path) -> dict[str, Any]:
    """Return what holds for derived models of the metadata of a card; nothing of a missing or damaged one."""
    from huggingface_hub import ModelCard

    try:
        declared = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: declared[key] for key in _KEYS if _is_named(declared.get(key))}


def _is_named(value: Any) -> bool:
    """Tell whether a value of a card is a text, or a list of them, as of several licences."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)
