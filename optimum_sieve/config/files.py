"""Settings in files: YAML or JSON, beside a model or on the Hub. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from optimum_sieve._messages import cut, shown


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

CONFIG_NAME = "sieve_config.json"
# More is no file of settings.
_MOST_BYTES = 2**20


class _Loader(yaml.SafeLoader):
    """YAML loader that reads `5e-4` as a number, as YAML 1.2 and JSON do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_mapping(path: Path, argument: str, what: str) -> dict[str, Any]:
    """Read a mapping from a JSON file, if its name ends in `.json`, or from a YAML file.

    Args:
        path (`Path`): The file.
        argument (`str`): Its name in error messages.
        what (`str`): What the file must be.

    Raises:
        FileNotFoundError: If `path` is no file.
        ValueError: If the file cannot be read, or holds no mapping.
    """
    file = cut(str(path))
    # A pipe can be read only once, and a device may never end.
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`{argument}` must be an existing {what}, not a pipe, got {file}.")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix.lower() == ".json" else yaml.load(text, Loader=_Loader)
    # PyYAML raises the errors of every type that a tag can name.
    except Exception as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else cut(" ".join(str(error).split()), 300)
        raise ValueError(f"`{argument}` must be a {what}, got an error in {file}: {reason}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"`{argument}` must hold a mapping in a {what}, got {shown(values)} in {file}.")
    return values


def read_settings(path: Path, owner: str) -> dict[str, Any]:
    """Read the settings of `owner` from a YAML or JSON file.

    Raises:
        FileNotFoundError: If `path` is no file.
        ValueError: If the file cannot be read, or is not a mapping.
    """
    return read_mapping(path, "config", f"YAML or JSON file of {owner} settings")


def save_settings(settings: dict[str, Any], directory: Path) -> Path:
    """Write `sieve_config.json` to a directory, which is made if it does not exist; return the file.

    Raises:
        OSError: If the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / CONFIG_NAME
    # Renamed once it is whole: a full disk leaves an earlier file as it was.
    with tempfile.TemporaryDirectory(prefix=".", dir=directory) as folder:
        temporary = Path(folder) / CONFIG_NAME
        temporary.write_text(_content(settings), encoding="utf-8")
        temporary.replace(file)
    return file


def load_settings(name: str, revision: str | None, owner: str) -> dict[str, Any]:
    """Read the settings of `owner` in a directory or Hub repository: those saved alone, or those of a pruned model.

    Raises:
        ValueError: If there are none.
        OSError: If the repository cannot be read.
    """
    file = _found(name, CONFIG_NAME, revision)
    if file is not None:
        return read_settings(file, owner)
    file = _found(name, "config.json", revision)
    block = {} if file is None else read_mapping(file, "name_or_path", "pruned model").get("sieve")
    settings = block.get("settings") if isinstance(block, dict) else None
    if not isinstance(settings, dict):
        raise ValueError(
            f"`name_or_path` must hold {CONFIG_NAME} or a pruned model, got {cut(name)}. Write one with "
            "`save_pretrained`."
        )
    return settings


def push_settings(settings: dict[str, Any], repo_id: str, **options: Any) -> CommitInfo:
    """Upload `sieve_config.json` to a repository on the Hub, which is created if it does not exist.

    Raises:
        HfHubHTTPError: If the Hub refuses; an `OSError`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None), library_name="optimum-sieve")
    name = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
    options.setdefault("commit_message", "Settings of optimum-sieve")
    content = _content(settings).encode()
    pushed: CommitInfo = api.upload_file(path_or_fileobj=content, path_in_repo=CONFIG_NAME, repo_id=name, **options)
    return pushed


def _content(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2) + "\n"


def _found(name: str, file: str, revision: str | None) -> Path | None:
    """Return a file of a directory, or of a repository on the Hub; `None` if it has none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        return Path(HfApi().hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError:
        # The Hub did not answer, so it is not known whether there is one.
        raise
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ValueError(f"`name_or_path` must be a directory or Hub id, got {cut(name)}.") from error
