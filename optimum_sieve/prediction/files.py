"""Predictions for the rows of a file: one JSON line for each row, so that a stopped run goes on. Without torch."""

from __future__ import annotations

import glob
import json
import math
import os
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum_sieve._messages import cut, listed, shown
from optimum_sieve.run.bars import progress_bar
from optimum_sieve.run.outputs import check_predictions_file
from optimum_sieve.run.reservation import exclusive
from optimum_sieve.run.workdir import content_key
from optimum_sieve.tasks.rows.files import read_file


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

STANDARD = "-"
# Keys that predictions add to a row, those of choices last.
ADDED = ("prediction", "probabilities")
ADDED_TO_CHOICES = (*ADDED, "index")
# Letters of the key in the name of a partial file.
_KEY_LENGTH = 12
# Of the summary.
_MOST_ANSWERS = 12


def read_rows(source: str) -> Iterable[dict[str, Any]]:
    """Return the rows of a JSON, CSV, TSV or parquet file, or of the standard input, `-`, as they come: JSON lines.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is malformed or empty.
    """
    if source == STANDARD:
        return _standard_input()
    try:
        rows = read_file(source, Path())
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("`data.files`", "`--input`")) from error
    if not rows:
        raise ValueError(f"`--input` must have rows, got none in {cut(source)}.")
    return rows


def _standard_input() -> Iterator[dict[str, Any]]:
    for number, line in enumerate(sys.stdin, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`--input` must hold one JSON object in each line, got line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"`--input` must hold one JSON object in each line, got {shown(row)} in line {number}.")
        yield row


def unanswered(rows: Iterable[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """Yield rows, after a check that none has a field that predictions of a kind of task add.

    Raises:
        ValueError: If one has; the message names it.
    """
    added = ADDED_TO_CHOICES if kind == "choices" else ADDED
    for number, row in enumerate(rows, start=1):
        present = [name for name in added if name in row]
        if present:
            raise ValueError(
                f"`--input` must have rows without the fields that predictions add, got {listed(present)} in row "
                f"{number}. Rename them."
            )
        try:
            _line(row).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else f"{error}"
            raise ValueError(f"`--input` must have rows that JSON can hold, got row {number}: {reason}.") from error
        yield row


def print_predictions(
    rows: Iterable[dict[str, Any]],
    predict: Callable[[list[Any]], list[dict[str, Any]]],
    chunk: int,
    rendered: Sequence[Any] | None = None,
) -> None:
    """Print the rows with their predictions, `chunk` rows at a time; the arguments are of [`write_predictions`]."""
    for answered in _answered(rows, predict, chunk, rendered):
        sys.stdout.write("".join(map(_line, answered)))
        sys.stdout.flush()


def write_predictions(
    rows: Sequence[dict[str, Any]] | Iterable[dict[str, Any]],
    predict: Callable[[list[Any]], list[dict[str, Any]]],
    output: Path,
    *,
    key: str,
    chunk: int,
    rendered: Sequence[Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """Write the rows with their predictions to a file, which appears once it is complete.

    Until then they are in a hidden file beside it, whose name contains `key`: a run with the same key goes on after the
    last complete line of it.

    Args:
        rows (`Iterable[dict]`): The rows; a list, or an iterator, which cannot be resumed.
        predict (`Callable`): Maps rows to answers.
        output (`Path`): The file, in a directory that exists.
        key (`str`): Hash of everything that the predictions depend on.
        chunk (`int`): Rows that are predicted and written at a time.
        rendered (`Sequence`, *optional*): What `predict` gets in place of the rows, where they are a list.
        overwrite (`bool`): Whether to replace a file of predictions.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `dict[str, int]`: How often each prediction occurs.

    Raises:
        OSError: If the disk is full, or another command writes the file. What was written before stays and is used
            again.
    """
    with exclusive(output):
        partial = partial_file(output, key)
        counts = _write(rows, predict, partial, chunk, progress, rendered)
        # Another program may have written it meanwhile.
        check_predictions_file(output, "--output", overwrite)
        partial.replace(output)
        # Those of the same file with other rows, or another model.
        for other in output.parent.glob(f".{glob.escape(output.name)}.{'?' * _KEY_LENGTH}.partial"):
            other.unlink()
        return counts


def _write(
    rows: Iterable[dict[str, Any]],
    predict: Callable[[list[Any]], list[dict[str, Any]]],
    partial: Path,
    chunk: int,
    progress: bool,
    rendered: Sequence[Any] | None,
) -> dict[str, int]:
    known = rows if isinstance(rows, list) else None
    kept = [] if known is None else _kept_answers(partial)
    if known is None or len(kept) > len(known):
        partial.unlink(missing_ok=True)
        kept = []
    counts, done = Counter(kept), len(kept)
    with (
        partial.open("a", encoding="utf-8", newline="") as file,
        progress_bar(
            total=None if known is None else len(known), initial=done, desc="predict", unit="row", progress=progress
        ) as bar,
    ):
        try:
            left = None if rendered is None else rendered[done:]
            for answered in _answered(rows if known is None else known[done:], predict, chunk, left):
                file.write("".join(map(_line, answered)))
                file.flush()
                counts.update(str(row["prediction"]) for row in answered)
                bar.update(len(answered))
        except BaseException:
            bar.close()
            if known is not None:
                print(f"stopped: the same command goes on after {sum(counts.values()):,} rows", file=sys.stderr)
            raise
        os.fsync(file.fileno())
    return dict(counts.most_common())


def partial_file(output: Path, key: str) -> Path:
    """Return the file that holds the predictions until they are complete."""
    return output.with_name(f".{output.name}.{content_key(key=key)[:_KEY_LENGTH]}.partial")


def summary(counts: dict[str, int]) -> str:
    """Describe how often each prediction occurs."""
    total = sum(counts.values())
    named = [f"{cut(name, 40)} {count:,}" for name, count in list(counts.items())[:_MOST_ANSWERS]]
    # Written answers differ from row to row.
    return f"{total:,} row{'s' * (total != 1)}" + (f": {', '.join(named)}" if len(counts) <= _MOST_ANSWERS else "")


def _answered(
    rows: Iterable[dict[str, Any]],
    predict: Callable[[list[Any]], list[dict[str, Any]]],
    chunk: int,
    rendered: Sequence[Any] | None,
) -> Iterator[list[dict[str, Any]]]:
    remaining, start = iter(rows), 0
    while some := list(islice(remaining, chunk)):
        answers = predict(some if rendered is None else list(rendered[start : start + len(some)]))
        yield [{**row, **answer} for row, answer in zip(some, answers, strict=True)]
        start += len(some)


def _line(row: dict[str, Any]) -> str:
    # Parquet has values that JSON has not: dates become texts, missing numbers null.
    return json.dumps(_plain(row), ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _kept_answers(partial: Path) -> list[str]:
    """Return the predictions in a partial file, and remove what follows the last whole line."""
    answers: list[str] = []
    if not partial.exists():
        return answers
    with partial.open("r+b") as file:
        end = 0
        for line in file:
            try:
                answers.append(str(json.loads(line)["prediction"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            if not line.endswith(b"\n"):
                answers.pop()
                break
            end += len(line)
        file.truncate(end)
    return answers
