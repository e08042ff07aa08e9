r"""Read rows from JSON, CSV and parquet files without converting values."""

from __future__ import annotations

import csv
import glob
import json
import tempfile
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from pathlib import Path


FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_file(source: str, root: Path) -> list[dict[str, Any]]:
    """Read the rows of the file `source`, a path relative to `root`.

    JSON and CSV are parsed here because `datasets` guesses types: it parses date-like strings, turns `007` into `7`
    and reads the first cell of a CSV line with one cell too many as an index. A CSV cell is a string, or `None` if
    empty.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the extension is unknown or the file is malformed; the message names the line.
    """
    path = root / source
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"`data.files` must end in one of {', '.join(FORMATS)}, got {source!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"`data.files` must name existing files, got {source!r}: {path} does not exist.")
    try:
        if suffix == ".parquet":
            return _read_parquet(path)
        # utf-8-sig accepts files with and without the byte order mark that spreadsheets write.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read_json(file.read()) if suffix in (".json", ".jsonl") else _read_csv(file, suffix)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"`data.files` must be well-formed, got an error in {source!r}: {error}") from error


def _read_json(text: str) -> list[dict[str, Any]]:
    """Parse a list of objects, or one object per line."""
    if text.lstrip().startswith("["):
        rows = list(enumerate(json.loads(text), start=1))
        unit = "item"
    else:
        rows = [(i, _read_line(i, line)) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        unit = "line"
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{unit} {number} is not an object but {type(row).__name__}")
    return [row for _, row in rows]


def _read_line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not valid JSON: {error}") from error


def _read_csv(file: Any, suffix: str) -> list[dict[str, Any]]:
    reader = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    header = next(reader, [])
    if len(set(header)) < len(header):
        raise ValueError(f"the header names a column twice: {', '.join(header)}")
    rows = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"line {reader.line_num} has {len(cells)} cells, the header has {len(header)}; quote values that "
                "contain the delimiter"
            )
        rows.append({name: cell or None for name, cell in zip(header, cells, strict=True)})
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    """Read with `datasets` and a temporary cache."""
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as cache:
        try:
            # `datasets` treats the path as a glob pattern.
            pattern = glob.escape(str(path))
            return list(Dataset.from_parquet(pattern, cache_dir=cache, keep_in_memory=True).to_list())
        except Exception as error:
            raise ValueError(str(error.__cause__ or error)) from error
