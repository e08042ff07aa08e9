"""The arguments of a search, stored in its work directory, so that a worker needs only that directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from optimum_sieve.config.sieve import SieveConfig
from optimum_sieve.run.checksum import sealed, unsealed


if TYPE_CHECKING:
    from argparse import Namespace

_NAME = "job.json"
_SOURCE = ("model", "task", "dtype", "gguf_file", "revision")


def write_job(arguments: Namespace, config: SieveConfig) -> None:
    """Store the model, the tasks, the settings and the study storage, unless its URL contains a password."""
    from optimum_sieve.run.files import replacing
    from optimum_sieve.run.workdir import WorkDir
    from optimum_sieve.search.study.storage import absolute_url, holds_secret

    path = WorkDir(arguments.work_dir).path
    assert path is not None
    source = {name: getattr(arguments, name) for name in _SOURCE}
    source |= {"model": _absolute(arguments.model), "task": [_absolute(task) for task in arguments.task]}
    url = arguments.study_storage and absolute_url(arguments.study_storage)
    is_secret = bool(url and holds_secret(url))
    storage = {"study_storage": None if is_secret else url, "study_storage_is_secret": is_secret}
    with replacing(path / _NAME) as temporary:
        content = sealed({**source, **storage, "settings": config.to_dict()})
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _absolute(name: str) -> str:
    """Return an absolute path, as a worker may start in another directory; Hub ids and names stay as they are."""
    from optimum_sieve.tasks.data import PREFIX

    path = name.removeprefix(PREFIX)
    return f"{name[: len(name) - len(path)]}{Path(path).resolve()}" if os.path.exists(path) else name


def read_job(arguments: Namespace) -> SieveConfig:
    """Fill in the arguments of the leading process that are not given again; return its settings.

    Raises:
        FileNotFoundError: If no search was started with this work directory.
        ValueError: If the file is damaged, or the URL of the study storage must be given.
    """
    path = Path(arguments.work_dir) / _NAME
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"`--work-dir` must be the directory of a started search, got {arguments.work_dir} without {_NAME}. Start "
            "`optimum-cli sieve search` without --worker first."
        )
    try:
        job = unsealed(json.loads(path.read_text(encoding="utf-8")))
        values = {name: job[name] for name in (*_SOURCE, "study_storage", "study_storage_is_secret")}
        config = SieveConfig.from_dict(job["settings"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`{path}` must be written by a search, got {error!r}. Start the search again.") from error
    if values.pop("study_storage_is_secret") and arguments.study_storage is None:
        raise ValueError("`--study-storage` must be given to each worker if its URL contains a password, got none.")
    for name, value in values.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return config
