"""A directory as a data set: hidden directories in it are no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from test_task_bounds import dataset_error
from toy import parity_rows, task_spec, write_rows

from optimum_sieve.tasks import Task


if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_hidden_directories_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_sieve.tasks.data._MOST_ENTRIES", 20)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl", parity_rows(20))
    for folder in (".git/objects", ".git"):
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        for i in range(20):
            (tmp_path / "data" / folder / f"{i}.txt").touch()
    task = Task.from_dict(task_spec(data={"dataset": "data", "split": "train"}), tmp_path)
    assert sum(task.splits.values()) == 20
    (tmp_path / "data" / ".git" / "again").symlink_to("..")
    dataset_error(tmp_path, "../data", r"regular files, .* got .*\.git/again' in '../data'. Remove")
