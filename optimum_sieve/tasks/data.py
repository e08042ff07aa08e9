r"""Where a task's rows come from: local files or a data set, one source for each split or one for several."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .files import read_file
from .prompts import Row
from .spec import check_keys


if TYPE_CHECKING:
    from pathlib import Path


SPLITS = ("calibration", "selection", "test")
DEFAULT_FRACTIONS = {"calibration": 0.5, "selection": 0.25, "test": 0.25}
_FILE_KEYS = ("files", "fractions")
_DATASET_KEYS = ("dataset", "name", "revision", "split", "splits", "fractions")


@dataclass(frozen=True)
class Data:
    """Where each split comes from. Splits that name the same source share it: it is cut between them.

    Args:
        sources (`dict[str, str]`):
            Split to a file (as the task file writes it) or a split of the data set.
        fractions (`dict[str, float]`):
            How a shared source is divided, in proportion; by default half for calibration and a quarter for each of
            the others.
        dataset (`str`, *optional*):
            Hub id or local directory; `None` for files.
        name (`str`, *optional*):
            Configuration of the data set.
        revision (`str`, *optional*):
            Revision of the data set on the Hub.
    """

    sources: dict[str, str]
    fractions: dict[str, float]
    dataset: str | None = None
    name: str | None = None
    revision: str | None = None

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Data:
        """Read the `data` of a task file.

        Raises:
            ValueError: If a key or value breaks its rule.
            TypeError: If a value is of the wrong type.
        """
        if ("files" in spec) == ("dataset" in spec):
            check_keys(spec, (*_FILE_KEYS, *_DATASET_KEYS), "data")
            got = "both" if "files" in spec else "neither"
            raise ValueError(f"`data` must have `files` or `dataset`, exactly one of them, got {got}.")
        check_keys(spec, _FILE_KEYS if "files" in spec else _DATASET_KEYS, "data")
        if "files" in spec:
            sources = _sources(spec["files"], "data.files")
            return cls(sources, _fractions(spec.get("fractions"), sources))
        if ("split" in spec) == ("splits" in spec):
            got = "both" if "split" in spec else "neither"
            raise ValueError(f"`data` must have `split` (cut by seed) or `splits`, exactly one of them, got {got}.")
        key = "split" if "split" in spec else "splits"
        sources = _sources(spec[key], f"data.{key}")
        texts = {name: _optional_text(spec, name) for name in ("dataset", "name", "revision")}
        if not texts["dataset"]:
            raise ValueError("`data.dataset` must be a Hub id or a directory, got none.")
        return cls(sources, _fractions(spec.get("fractions"), sources), **texts)

    def sharing(self, source: str) -> list[str]:
        """Return the splits that come from `source`."""
        return [split for split in SPLITS if self.sources.get(split) == source]

    def load(self, root: Path) -> dict[str, list[Row]]:
        """Read every source once.

        Raises:
            FileNotFoundError: If a file is not there.
            ValueError: If a source cannot be read or has no rows.
        """
        return {source: self._load(source, root) for source in dict.fromkeys(self.sources.values())}

    def _load(self, source: str, root: Path) -> list[Row]:
        if self.dataset is None:
            label, rows = source, read_file(source, root)
        else:
            label, rows = (
                f"{self.dataset}[{source}]",
                _read_dataset(self.dataset, source, self.name, self.revision, root),
            )
        if not rows:
            raise ValueError(f"`data` must have rows in every source, got none in {label}.")
        return [Row(fields, label, number) for number, fields in enumerate(rows, start=1)]


def _read_dataset(dataset: str, split: str, name: str | None, revision: str | None, root: Path) -> list[dict[str, Any]]:
    """Load one split; a local directory leaves no cache behind, a Hub data set uses the ordinary one."""
    from datasets import load_dataset

    local = root / dataset
    try:
        if not local.is_dir():
            return list(load_dataset(dataset, name=name, split=split, revision=revision).to_list())
        with tempfile.TemporaryDirectory() as cache:
            loaded = load_dataset(str(local), name=name, split=split, cache_dir=cache, keep_in_memory=True)
            return list(loaded.to_list())
    # `datasets` lets the errors of every file format and of the network through.
    except Exception as error:
        raise ValueError(
            f"`data.dataset` must be a data set that `datasets.load_dataset` can load, got {dataset!r} with split "
            f"{split!r}: {error.__cause__ or error}"
        ) from error


def _sources(spec: Any, key: str) -> dict[str, str]:
    if isinstance(spec, str):
        return dict.fromkeys(SPLITS, spec)
    if not isinstance(spec, dict) or not spec or not all(isinstance(value, str) for value in spec.values()):
        raise TypeError(f"`{key}` must be one name, or a mapping from {', '.join(SPLITS)} to names, got {spec!r}.")
    check_keys(spec, SPLITS, key)
    return {split: spec[split] for split in SPLITS if split in spec}


def _fractions(spec: Any, sources: dict[str, str]) -> dict[str, float]:
    if spec is None:
        return DEFAULT_FRACTIONS
    if not isinstance(spec, dict):
        raise TypeError(f"`data.fractions` must be a mapping from splits to numbers, got {spec!r}.")
    check_keys(spec, SPLITS, "data.fractions")
    shared = [split for split in sources if list(sources.values()).count(sources[split]) > 1]
    if sorted(spec) != sorted(shared):
        raise ValueError(
            f"`data.fractions` must name exactly the splits that share a source ({', '.join(shared) or 'none'}), got "
            f"{', '.join(spec)}."
        )
    for split, value in spec.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"`data.fractions.{split}` must be a number above 0, got {value!r}.")
    return spec


def _optional_text(spec: dict[str, Any], key: str) -> Any:
    if spec.get(key) is not None and not isinstance(spec[key], str):
        raise TypeError(f"`data.{key}` must be a text, got {spec[key]!r}. Put it in quotes.")
    return spec.get(key)
