r"""Rows in memory: a `datasets.Dataset`, a `DatasetDict`, a list of dictionaries, or one of these for each split."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import listed, shown


if TYPE_CHECKING:
    from collections.abc import Iterable


SOURCE = "data"
_VALIDATION = ("validation", "valid", "val", "dev")
_OWN = ("calibration", "selection", "test", "unlabelled")
_SPEC_KEYS = ("files", "dataset", "rows")
_FORMS = "a `datasets.Dataset` or `DatasetDict`, a list of dictionaries, or a mapping from splits to these"


class MemoryRows(dict[str, list[dict[str, Any]]]):
    """Rows of each source by name."""

    def described(self) -> dict[str, int]:
        """Return the number of rows of each source, which stands for them in a task file."""
        return {source: len(rows) for source, rows in self.items()}


def in_memory(data: Any) -> dict[str, Any] | None:
    """Return the `data` of a task with its rows in memory as [`MemoryRows`]; `None` for a task file's mapping.

    Args:
        data (`Any`):
            Rows, or `{"rows": ..., "splits": ..., "fractions": ...}`; the latter two as in a task file.

    Raises:
        TypeError: If the rows are of another type.
        ValueError: If the splits of a data set have other names than those known.
    """
    if isinstance(data, dict) and any(key in data for key in _SPEC_KEYS):
        if "rows" not in data:
            return None
        rows = memory_rows(data["rows"])
        return {**data, "rows": rows, "splits": data["splits"] if "splits" in data else _splits(rows)}
    if isinstance(data, dict) and not any(
        isinstance(rows, list | tuple) or _is_dataset(rows) for rows in data.values()
    ):
        # Keys of a task file that are mistyped: the error will name those known.
        return None
    rows = memory_rows(data)
    return {"rows": rows, "splits": _splits(rows)}


def memory_rows(value: Any) -> MemoryRows:
    """Return rows by source; those of a single table have the source `"data"`.

    Raises:
        TypeError: If they are of another type.
    """
    if isinstance(value, MemoryRows):
        return value
    if isinstance(value, dict):
        return MemoryRows({str(split): _rows(rows, str(split)) for split, rows in value.items()})
    return MemoryRows({SOURCE: _rows(value, SOURCE)})


def _splits(rows: MemoryRows) -> str | dict[str, str]:
    return SOURCE if list(rows) == [SOURCE] else splits_of(rows)


def splits_of(names: Iterable[str]) -> dict[str, str]:
    """Return which of a data set's splits serve for calibration, selection and test.

    Its test split, else its validation split, is the test split. Its train split is for calibration, and its validation
    split, if it is not the test split, for selection. Calibration and selection share the train split, or else the
    validation split, if there is no other. Splits called calibration, selection, test and unlabelled serve as such.

    Raises:
        ValueError: If there is another split.

    Example:

    ```python
    >>> splits_of(["train", "validation", "test"])
    {'calibration': 'train', 'selection': 'validation', 'test': 'test'}
    >>> splits_of(["train", "test"])
    {'calibration': 'train', 'selection': 'train', 'test': 'test'}

    ```
    """
    names = list(names)
    if set(names) <= set(_OWN) and set(names) != {"test"}:
        return {split: split for split in _OWN if split in names}
    validation = next((name for name in _VALIDATION if name in names), None)
    others = [name for name in names if name not in ("train", "test", validation)]
    if others:
        raise ValueError(
            f"`data` must have splits called train, validation and test, or {', '.join(_OWN)}, got {listed(others)}. "
            'Say which is which: `data={"calibration": dataset["train"], ...}`.'
        )
    train = "train" if "train" in names else None
    test = "test" if "test" in names else validation or "train"
    rest = validation if validation != test else None
    calibration = train or rest or test
    return {"calibration": calibration, "selection": rest or calibration, "test": test}


def _rows(value: Any, name: str) -> list[dict[str, Any]]:
    if _is_dataset(value):
        return list(value.to_list())
    if _is_dataset(value, "IterableDataset"):
        raise TypeError(
            f"`data` must be {_FORMS}, got an IterableDataset for {name!r}, which may never end. Take the rows that "
            "the task needs: `list(dataset.take(2000))`."
        )
    if not isinstance(value, list | tuple):
        raise TypeError(
            f"`data` must be {_FORMS}, got {type(value).__name__} for {name!r}. Of a pandas table: "
            '`df.to_dict("records")`.'
        )
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
            raise TypeError(
                f"`data` must have rows that are dictionaries with field names as keys, got {shown(row)} as row "
                f"{number} of {name!r}."
            )
    return [dict(row) for row in value]


def _is_dataset(value: Any, kind: str = "Dataset") -> bool:
    """Whether `value` is a table of `datasets`. If nobody imported that library, nothing is."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(value, getattr(datasets, kind))
