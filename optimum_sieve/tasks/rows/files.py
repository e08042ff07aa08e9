r"""Read rows from JSON, CSV and parquet files without converting values."""

from __future__ import annotations

import csv
import glob
import json
import os
import tempfile
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import cut, listed, shown


if TYPE_CHECKING:
    from pathlib import Path


_PANDAS = 'write it with `df.to_json(path, orient="records", lines=True)`'
_DELIMITERS = {"semicolon": ";", "tab": "\t", "comma": ",", "vertical bar": "|"}
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
        raise ValueError(f"`data.files` must end in one of {', '.join(FORMATS)}, got {shown(source)}.")
    if not os.path.isfile(path):
        reason = "is no regular file" if os.path.lexists(path) else "does not exist"
        raise FileNotFoundError(
            f"`data.files` must name existing files, got {shown(source)}: {cut(str(path))} {reason}."
        )
    try:
        if suffix == ".parquet":
            return _read_parquet(path)
        # utf-8-sig accepts files with and without the byte order mark that spreadsheets write.
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _read_json(file.read()) if suffix in (".json", ".jsonl") else _read_csv(file, suffix)
    except (ValueError, csv.Error, OSError) as error:
        raise ValueError(
            f"`data.files` must be well-formed, got an error in {shown(source)}: {cut(str(error), 400)}"
        ) from error


def _read_json(text: str) -> list[dict[str, Any]]:
    """Parse a list of objects, or one object per line."""
    if text.lstrip().startswith("["):
        rows = list(enumerate(_parse(text), start=1))
        unit = "item"
    else:
        rows = [(i, _read_line(i, line)) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        unit = "line"
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{unit} {number} is not an object but {type(row).__name__}")
    if len(rows) == 1:
        _refuse_columns(rows[0][1])
    return [row for _, row in rows]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _read_line(number: int, line: str) -> Any:
    try:
        return _parse(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not valid JSON: {error}") from error


def _refuse_columns(only: dict[str, Any]) -> None:
    """Refuse a table of columns, as pandas and datasets write it, which reads like one row."""
    columns = list(only.values())
    by_index = columns and all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns)
    by_position = len(columns) > 1 and all(isinstance(column, list) and len(column) > 1 for column in columns)
    if by_index or (by_position and len({len(column) for column in columns}) == 1):
        raise ValueError(f"it holds columns ({listed(only)}) and no rows; {_PANDAS}")
    if only.keys() in ({"columns", "index", "data"}, {"schema", "data"}):
        raise ValueError(f"it holds one object ({listed(only)}) and no rows; {_PANDAS}")


def _read_csv(file: Any, suffix: str) -> list[dict[str, Any]]:
    reader = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    header = next(reader, [])
    _check_delimiter(header, suffix)
    if len(set(header)) < len(header):
        raise ValueError(f"the header names a column twice: {listed(header)}")
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


def _check_delimiter(header: list[str], suffix: str) -> None:
    """Refuse a header of one column that other delimiters would divide."""
    others = [name for name, other in _DELIMITERS.items() if len(header) == 1 and other in header[0]]
    if others:
        raise ValueError(
            f"the header is one column, {shown(header[0])}, and the delimiter of a {suffix} file is a "
            f"{'tab' if suffix == '.tsv' else 'comma'}, not a {others[0]}; write it with "
            f"`df.to_csv(path, index=False{', sep=chr(9)' if suffix == '.tsv' else ''})`"
        )


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
