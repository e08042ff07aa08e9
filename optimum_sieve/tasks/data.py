r"""Read a task's rows from local files or a dataset; splits may share a source."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_sieve._messages import cut, listed, shown

from .rows.files import read_file
from .rows.memory import MemoryRows
from .spec import check_keys, read_spec
from .templates.template import Row


# Before the name of a task of lm-evaluation-harness, or the path of its YAML.
PREFIX = "lm_eval:"
SPLITS = ("calibration", "selection", "test")
# Optional: more rows for calibration and healing, without answers.
UNLABELLED = "unlabelled"
NAMES = (*SPLITS, UNLABELLED)
# Those that a model is adapted to.
INPUTS = ("calibration", UNLABELLED)
DEFAULT_FRACTIONS = {"calibration": 0.5, "selection": 0.25, "test": 0.25}
_LARGEST_FRACTION = 10**9
# `datasets` searches a directory with all its links, several times.
_MOST_ENTRIES = 10_000
# It loads nothing from hidden directories, such as the `.git` of a clone, but searches them too.
_MOST_HIDDEN_ENTRIES = 100_000
_FILE_KEYS = ("files", "fractions")
_DATASET_KEYS = ("dataset", "name", "revision", "split", "splits", "fractions")
_MEMORY_KEYS = ("rows", "splits", "fractions")


@dataclass(frozen=True)
class Data:
    """Source of each split. A source named by several splits is divided between them.

    Args:
        sources (`dict[str, str]`):
            Maps a split to a file (as written in the task file) or to a split of the dataset.
        fractions (`dict[str, float]`):
            Relative sizes of the splits of a shared source; by default 0.5 for calibration, 0.25 for each other.
        dataset (`str`, *optional*):
            Hub id or local directory; `None` for files.
        name (`str`, *optional*):
            Configuration of the dataset.
        revision (`str`, *optional*):
            Revision of the dataset on the Hub.
        rows (`MemoryRows`, *optional*):
            Rows of each source in memory, instead of files or a dataset.
    """

    sources: dict[str, str]
    fractions: dict[str, float]
    dataset: str | None = None
    name: str | None = None
    revision: str | None = None
    rows: MemoryRows | None = None

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Data:
        """Read the `data` key of a task file.

        Raises:
            ValueError: If a key or value is invalid.
            TypeError: If a value has the wrong type.
        """
        if "rows" in spec:
            return cls._in_memory(spec)
        if ("files" in spec) == ("dataset" in spec):
            check_keys(spec, (*_FILE_KEYS, *_DATASET_KEYS), "data")
            got = "both" if "files" in spec else "neither"
            raise ValueError(f"`data` must have exactly one of `files` and `dataset`, got {got}.")
        check_keys(spec, _FILE_KEYS if "files" in spec else _DATASET_KEYS, "data")
        if "files" in spec:
            sources = _sources(spec["files"], "data.files")
            return cls(sources, _fractions(spec.get("fractions"), sources))
        if ("split" in spec) == ("splits" in spec):
            got = "both" if "split" in spec else "neither"
            raise ValueError(f"`data` must have exactly one of `split` (divided by seed) and `splits`, got {got}.")
        key = "split" if "split" in spec else "splits"
        sources = _sources(spec[key], f"data.{key}")
        dataset = {name: _optional_string(spec, name) for name in ("dataset", "name", "revision")}
        if not dataset["dataset"]:
            raise ValueError("`data.dataset` must be a Hub id or a directory, got none.")
        return cls(sources, _fractions(spec.get("fractions"), sources), **dataset)

    @classmethod
    def _in_memory(cls, spec: dict[str, Any]) -> Data:
        check_keys(spec, _MEMORY_KEYS, "data")
        rows = spec["rows"]
        if not isinstance(rows, MemoryRows):
            raise ValueError(
                f"`data.rows` must be given in Python, got {shown(rows)} in a task file. Name `files` or a `dataset`, "
                "or make the task by `Task(data=rows, ...)`."
            )
        sources = _sources(spec["splits"], "data.splits")
        unknown = [source for source in sources.values() if source not in rows]
        if unknown:
            raise ValueError(
                f"`data.splits` must name the sources of the rows, {listed(rows)}, got {shown(unknown[0])}."
            )
        return cls(sources, _fractions(spec.get("fractions"), sources), rows=rows)

    def sharing(self, source: str) -> list[str]:
        """Return the splits taken from `source`."""
        return [split for split in NAMES if self.sources.get(split) == source]

    def load(self, root: Path) -> dict[str, list[Row]]:
        """Read every source once.

        Raises:
            FileNotFoundError: If a file does not exist.
            ValueError: If a source cannot be read or has no rows.
        """
        return {source: self._load(source, root) for source in dict.fromkeys(self.sources.values())}

    def _load(self, source: str, root: Path) -> list[Row]:
        if self.rows is not None:
            label, rows = source, self.rows[source]
        elif self.dataset is None:
            label, rows = source, read_file(source, root)
        else:
            label, rows = (
                f"{self.dataset}[{source}]",
                _read_dataset(self.dataset, source, self.name, self.revision, root),
            )
        if not rows:
            raise ValueError(f"`data` must have rows in every source, got none in {cut(label)}.")
        return [Row(fields, label, number) for number, fields in enumerate(rows, start=1)]


def local_paths(task_file: Path) -> list[Path]:
    """Return a task file and the files, or the directory, of its data. Reading the task reports errors in it."""
    if str(task_file).startswith(PREFIX):
        path = Path(str(task_file).removeprefix(PREFIX))
        return [path] if path.is_file() else []
    try:
        data = Data.from_spec(read_spec(task_file)["data"])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        return [task_file]
    names = data.sources.values() if data.dataset is None else [data.dataset]
    return [task_file, *(task_file.parent / name for name in names)]


def _read_dataset(dataset: str, split: str, name: str | None, revision: str | None, root: Path) -> list[dict[str, Any]]:
    """Load one split; a local directory uses a temporary cache, a Hub dataset the default one."""
    from datasets import load_dataset

    local = root / dataset
    if os.path.isdir(local):
        _check_directory(dataset, local)
    try:
        if not os.path.isdir(local):
            return list(load_dataset(dataset, name=name, split=split, revision=revision).to_list())
        with tempfile.TemporaryDirectory() as cache:
            loaded = load_dataset(str(local), name=name, split=split, cache_dir=cache, keep_in_memory=True)
            return list(loaded.to_list())
    # `datasets` raises the errors of every file format and of the network.
    except Exception as error:
        raise ValueError(
            f"`data.dataset` must be a dataset that `datasets.load_dataset` can load, got {shown(dataset)} with split "
            f"{shown(split)}: {cut(str(error.__cause__ or error), 400)}"
        ) from error


def _check_directory(dataset: str, path: Path) -> None:
    """Raise `ValueError` if the directory has very many entries, links that lead back, or files that never end."""
    count = hidden = 0
    for folder, folders, files in os.walk(path, followlinks=True):
        if f"{os.sep}." in folder.removeprefix(str(path)):
            hidden += len(folders) + len(files)
        else:
            count += len(folders) + len(files)
        if count > _MOST_ENTRIES or hidden > _MOST_HIDDEN_ENTRIES:
            raise ValueError(
                f"`data.dataset` must be a directory of at most {_MOST_ENTRIES:,} files, got more in {shown(dataset)}. "
                "Name the directory of the data alone."
            )
        for name in (*folders, *files):
            entry = os.path.join(folder, name)
            is_loop = os.path.islink(entry) and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(entry)}/")
            if is_loop or (name in files and os.path.exists(entry) and not os.path.isfile(entry)):
                raise ValueError(
                    f"`data.dataset` must be a directory of regular files, without links to a directory above, got "
                    f"{shown(entry)} in {shown(dataset)}. Remove it, or name the directory of the data alone."
                )


def _sources(spec: Any, key: str) -> dict[str, str]:
    if isinstance(spec, str):
        return dict.fromkeys(SPLITS, spec)
    if not isinstance(spec, dict) or not spec or not all(isinstance(value, str) for value in spec.values()):
        raise TypeError(f"`{key}` must be one name, or a mapping from {', '.join(NAMES)} to names, got {shown(spec)}.")
    check_keys(spec, NAMES, key)
    return {split: spec[split] for split in NAMES if split in spec}


def _fractions(spec: Any, sources: dict[str, str]) -> dict[str, float]:
    shared = [split for split in sources if list(sources.values()).count(sources[split]) > 1]
    if spec is None:
        if UNLABELLED in shared:
            raise ValueError(
                f"`data.fractions` must be given where `{UNLABELLED}` shares a source with another split, got none. "
                f"Name the share of each split, or another source for `{UNLABELLED}`."
            )
        return DEFAULT_FRACTIONS
    if not isinstance(spec, dict):
        raise TypeError(f"`data.fractions` must be a mapping from splits to numbers, got {shown(spec)}.")
    check_keys(spec, NAMES, "data.fractions")
    if sorted(spec) != sorted(shared):
        raise ValueError(
            f"`data.fractions` must name exactly the splits that share a source ({', '.join(shared) or 'none'}), got "
            f"{listed(spec)}."
        )
    for split, value in spec.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST_FRACTION:
            raise ValueError(
                f"`data.fractions.{split}` must be a number above 0 and at most {_LARGEST_FRACTION:,}, got "
                f"{shown(value)}."
            )
    return spec


def _optional_string(spec: dict[str, Any], key: str) -> Any:
    if spec.get(key) is not None and not isinstance(spec[key], str):
        raise TypeError(f"`data.{key}` must be a string, got {shown(spec[key])}. Put it in quotes.")
    return spec.get(key)
