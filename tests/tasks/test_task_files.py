"""The task files in examples/tasks/ fit rows of the fields that they name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from task_rows import ROWS
from toy import make_tokenizer, write_rows

from optimum_sieve.metrics.text_metrics import score_texts
from optimum_sieve.tasks import Task


if TYPE_CHECKING:
    from optimum_sieve.tasks import Example

FILES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "examples" / "tasks").glob("*.yaml"))}


def examples_of(name: str, directory: Path) -> list[Example]:
    """Read the task file with the rows in every place that it names, distinct by split."""
    shutil.copy(FILES[name], directory / "task.yaml")
    spec = yaml.safe_load(FILES[name].read_text())
    field = "question" if "question" in ROWS[name][0][0] else "text"
    for split, file in spec["data"]["files"].items():
        path = directory / file
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**row, field: f"{split} {row[field]}"} for row in ROWS[name][0]]
        write_rows(path, [{**row, "title": f"{split} {row['title']}"} if "title" in row else row for row in rows])
    task = Task.from_file(directory / "task.yaml")
    assert task.splits == {"calibration": 2, "selection": 2, "test": 2}
    return task.examples("test", make_tokenizer())


def test_every_file_is_tested() -> None:
    assert FILES.keys() == ROWS.keys()


@pytest.mark.parametrize("name", FILES)
def test_rows_of_the_data_set_fit(name: str, tmp_path: Path) -> None:
    examples = examples_of(name, tmp_path)
    answers = sorted(ROWS[name][1])
    if name == "medmcqa":
        lines = [example.prompt.splitlines()[1 + example.target] for example in examples]
        assert sorted(line.split(". ")[1] for line in lines) == answers
        assert {example.candidates for example in examples} == {(" A", " B", " C", " D")}
    else:
        assert sorted(example.answer for example in examples) == answers
    assert all("{" not in example.prompt for example in examples)


@pytest.mark.parametrize("name", [name for name in FILES if "kind: generate" in FILES[name].read_text()])
def test_the_gold_answer_has_full_score(name: str, tmp_path: Path) -> None:
    examples = examples_of(name, tmp_path)
    metric = yaml.safe_load(FILES[name].read_text())["metric"]
    written = [example.answer.removesuffix(example.generation.stop[0]) for example in examples]
    assert score_texts(metric, written, [example.accepted for example in examples]).score == 1.0


@pytest.mark.parametrize("name", FILES)
def test_the_first_lines_say_which_data_set_it_is_and_where_its_rows_belong(name: str) -> None:
    first, second, third = FILES[name].read_text().splitlines()[:3]
    assert first.startswith("# ")
    assert first.rstrip(".)").split()[-1].isdigit()
    assert "Not included: put or link the rows under data/" in second
    assert third.startswith("# A row: {")
