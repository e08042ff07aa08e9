"""Every bad task file or data file ends in one message that says what is wrong, before any model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from toy import load_task, parity_rows, task_spec

from optimum_sieve.tasks import Task


if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"promt": "x"}, ValueError, r"`task` must have known keys only, got 'promt'. Did you mean `prompt`\?"),
        ({"zzz": 1}, ValueError, r"got 'zzz'. Known keys: name, kind, data"),
        ({"name": None}, ValueError, r"`name` must be given in the task file: a string"),
        ({"name": 3}, TypeError, r"`name` must be a string, got 3"),
        ({"kind": None}, ValueError, r"`kind` must be given"),
        ({"kind": "label"}, ValueError, r"`kind` must be one of labels, choices, generate, got 'label'"),
        ({"metric": "accurate"}, ValueError, r"`metric` must be one of accuracy, macro_f1, got 'accurate'"),
        ({"prompt": None}, ValueError, r"Exactly one of `prompt` and `chat` must be given, got neither"),
        ({"chat": []}, ValueError, r"Exactly one of `prompt` and `chat` must be given, got both"),
        ({"prompt": 3}, TypeError, r"`prompt` must be a string, got 3. For messages use `chat`"),
        ({"prompt": None, "chat": []}, TypeError, r"`chat` must be a list of messages"),
        ({"prompt": None, "chat": ["hello"]}, TypeError, r"`chat\[0\]` must be a mapping with `role` and `content`"),
        (
            {"prompt": None, "chat": [{"role": "user", "contents": "x"}]},
            ValueError,
            r"`chat\[0\]` must have known keys only, got 'contents'. Did you mean `content`\?",
        ),
        ({"prompt": None, "chat": [{"role": "user"}]}, TypeError, r"`chat\[0\].content` must be a string, got None"),
        ({"prompt": "{{ text }"}, ValueError, r"`prompt` must be a valid jinja2 template, got .*\(line 1\)"),
        ({"answer": "{% if %}"}, ValueError, r"`answer` must be a valid jinja2 template"),
        (
            {"prompt": "{{ txt }}"},
            ValueError,
            r"`prompt` must name fields of the data, got 'txt' in row \d+ of rows.jsonl. Did you mean 'text'\? "
            r"Its fields are: text, label",
        ),
        (
            {"prompt": None, "chat": [{"role": "user", "content": "{{ Q }}"}]},
            ValueError,
            r"`chat\[0\].content` must name fields of the data, got 'Q'",
        ),
        ({"answer": "{{ gold }}"}, ValueError, r"`answer` must name fields of the data, got 'gold'"),
        ({"prompt": "{{ text.a.b }}"}, ValueError, r"`prompt` must render for every row, got UndefinedError in row"),
        ({"prompt": "{{ text.__class__ }}"}, ValueError, r"`prompt` must render for every row, got SecurityError"),
        (
            {"prompt": "{{ 1 / (text | length * 0) }}"},
            ValueError,
            r"`prompt` must render for every row, got ZeroDivisionError",
        ),
        ({"prompt": "{{ row.nothing }}"}, ValueError, r"got UndefinedError .*has no attribute 'nothing'"),
        (
            {"prompt": " {{ text[:0] }}\n"},
            ValueError,
            r"`prompt` must not be empty, got ' \\n' in row \d+ of rows.jsonl",
        ),
        ({"answer": 3}, TypeError, r"`answer` must be a template that renders to one of the labels, got 3"),
        (
            {"answer": "{{ label }}!"},
            ValueError,
            r"`answer` must be one of the labels 'odd', 'even', got '(odd|even)!' in row \d+ of rows.jsonl",
        ),
        ({"labels": None}, ValueError, r"`labels` must be given in the task file: a mapping"),
        ({"labels": ["odd", "even"]}, TypeError, r"`labels` must be a mapping from each label"),
        ({"labels": {"odd": " odd"}}, ValueError, r"`labels` must name at least two labels, got \['odd'\]"),
        ({"labels": {"odd": 1, "even": 2}}, TypeError, r"`labels.odd` must be a string, got 1. Put it in quotes"),
        ({"labels": {"odd": "", "even": "x"}}, ValueError, r"`labels.odd` must not be empty"),
        ({"labels": {"odd": " x", "even": " x"}}, ValueError, r"`labels` must have distinct texts, got \[' x', ' x'\]"),
        *(
            ({"name": value}, ValueError, r"`name` must be a line of text, which reports show, got ")
            for value in ("", " ", "a\nb", "\x00")
        ),
        *(
            ({"limit": value}, TypeError, rf"`limit` must be a mapping from .*, got {shown}")
            for value, shown in (([], r"\[\]"), ("", "''"), (0, "0"), (False, "False"))
        ),
        ({"limit": 5}, TypeError, r"`limit` must be a mapping from calibration, selection, test"),
        ({"limit": {"train": 5}}, ValueError, r"`limit` must have known keys only, got 'train'"),
        ({"limit": {"test": 0}}, ValueError, r"`limit.test` must be a whole number of at least 1, got 0"),
        ({"limit": {"test": True}}, ValueError, r"`limit.test` must be a whole number of at least 1, got True"),
        ({"seed": -1}, ValueError, r"`seed` must be a whole number of at least 0, got -1"),
        ({"group": 3}, TypeError, r"`group` must be the name of a field, got 3"),
        ({"group": "author"}, ValueError, r"`group` must name a field of the data, got 'author' in row 1 of rows"),
        ({"data": None}, ValueError, r"`data` must be given in the task file"),
        ({"data": "rows.jsonl"}, TypeError, r"`data` must be a mapping with `files` or `dataset`, got 'rows.jsonl'"),
        ({"data": {}}, ValueError, r"`data` must have exactly one of `files` and `dataset`, got neither"),
        ({"data": {"files": "a", "dataset": "b"}}, ValueError, r"exactly one of `files` and `dataset`, got both"),
        ({"data": {"file": "a"}}, ValueError, r"`data` must have known keys only, got 'file'. Did you mean `files`\?"),
        ({"data": {"files": "a", "split": "b"}}, ValueError, r"`data` must have known keys only, got 'split'"),
        ({"data": {"files": 3}}, TypeError, r"`data.files` must be one name, or a mapping from calibration"),
        ({"data": {"files": {}}}, TypeError, r"`data.files` must be one name, or a mapping"),
        (
            {"data": {"files": {"train": "rows.jsonl"}}},
            ValueError,
            r"`data.files` must have known keys only, got 'train'. Known keys: calibration, selection, test",
        ),
        ({"data": {"files": "rows.txt"}}, ValueError, r"`data.files` must end in one of .jsonl.*got 'rows.txt'"),
        ({"data": {"files": "no.jsonl"}}, FileNotFoundError, r"`data.files` must name existing files, got 'no.jsonl'"),
        (
            {"data": {"dataset": "a"}},
            ValueError,
            r"`data` must have exactly one of `split` \(divided by seed\) and `splits`, got neither",
        ),
        ({"data": {"dataset": "a", "split": "b", "splits": {"test": "c"}}}, ValueError, r"`splits`.*got both"),
        ({"data": {"dataset": "", "split": "b"}}, ValueError, r"`data.dataset` must be a Hub id or a directory"),
        ({"data": {"dataset": "a", "name": 3, "split": "b"}}, TypeError, r"`data.name` must be a string, got 3"),
        (
            {"data": {"dataset": "someone/nothing", "split": "train"}},
            ValueError,
            r"`data.dataset` must be a dataset that `datasets.load_dataset` can load, got 'someone/nothing'",
        ),
        ({"data": {"files": "rows.jsonl", "fractions": 0.5}}, TypeError, r"`data.fractions` must be a mapping"),
        (
            {"data": {"files": "rows.jsonl", "fractions": {"test": 0.5}}},
            ValueError,
            r"`data.fractions` must name exactly the splits that share a source \(calibration, selection, test\)",
        ),
        (
            {"data": {"files": {"test": "rows.jsonl"}, "fractions": {"test": 0.5}}},
            ValueError,
            r"`data.fractions` must name exactly the splits that share a source \(none\), got test",
        ),
        (
            {"data": {"files": "rows.jsonl", "fractions": {"calibration": 1, "selection": 1, "test": 0}}},
            ValueError,
            r"`data.fractions.test` must be a number above 0 and at most 1,000,000,000, got 0",
        ),
    ],
)
def test_bad_task_files(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_task(tmp_path, **changes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "task.json"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("task.yaml", "name: [", r"`task` must be a valid YAML or JSON file, got an error in .*task.yaml.*line 1"),
        ("task.json", '{"name": ', r"`task` must be a valid YAML or JSON file, got an error in .*task.json"),
        ("task.yaml", "- a\n- b", r"`task` must hold a mapping of keys, got list"),
        ("task.yaml", "", r"`task` must hold a mapping of keys, got NoneType"),
        ("task.yaml", "labels: {a: x, a: y}", r"the key 'a' is given more than once"),
        ("task.json", '{"seed": 1, "seed": 2}', r"the key 'seed' is given more than once"),
        ("task.yaml", "name: \xe9".encode("latin-1"), r"`task` must be a valid YAML or JSON file.*codec can't decode"),
        ("task.yaml", "!!python/object:os.system {}", r"`task` must be a valid YAML or JSON file"),
    ],
)
def test_malformed_task_files(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Task.from_file(tmp_path / name)


def test_a_task_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`task` must be an existing task file .* got .*missing.yaml"):
        Task.from_file(tmp_path / "missing.yaml")


def test_a_task_must_hold_json_types() -> None:
    with pytest.raises(TypeError, match=r"`task.seed` must be a string, number, list or mapping, got set"):
        Task.from_dict(task_spec(seed={1}))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"text": "1"}\n{"text":\n', r"got an error in 'rows.jsonl': line 2 is not valid JSON"),
        ("rows.jsonl", '{"text": "1"}\n"2"\n', r"line 2 is not an object but str"),
        ("rows.json", '[{"text": "1"}, 2]', r"item 2 is not an object but int"),
        ("rows.json", '[{"text": "1"}', r"got an error in 'rows.json'"),
        (
            "rows.csv",
            "text,label\nfine,odd\none, two,odd\n",
            r"line 3 has 3 cells, the header has 2; quote values that contain the delimiter",
        ),
        ("rows.csv", "text,text\n1,2\n", r"the header names a column twice: text, text"),
        ("rows.csv", 'text,label\n"1,odd\n', r"got an error in 'rows.csv': unexpected end of data"),
        ("rows.csv", b"text,label\n\xe9,odd\n", r"got an error in 'rows.csv': .*codec can't decode"),
        ("rows.parquet", "no parquet", r"got an error in 'rows.parquet': .*[Pp]arquet"),
        ("rows.jsonl", "", r"`data` must have rows in every source, got none in rows.jsonl"),
        ("rows.csv", "text,label\n", r"`data` must have rows in every source, got none in rows.csv"),
        ("rows.csv", "text,label\n1,odd\n,odd\n", r"must not print a missing value, got one for text in row 2 of rows"),
    ],
)
def test_malformed_data_files(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        Task.from_dict(task_spec(data={"files": {"test": name}}), tmp_path)


def test_missing_values_are_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = parity_rows(20)
    rows[4]["text"] = None
    message = "`prompt` must not print a missing value, got one for text in row 5 of rows.jsonl. Fill it in"
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path, rows)
    rows[4] |= {"text": "4", "label": None}
    with pytest.raises(ValueError, match="`answer` must not print a missing value, got one for label in row 5 of rows"):
        load_task(tmp_path, rows)
    rows[4] = {"text": {"inner": None}, "label": "odd"}
    with pytest.raises(ValueError, match="`prompt` must not print a missing value, got one for text in row 5 of rows"):
        load_task(tmp_path, rows, prompt="{{ text.inner if text.inner is defined else text }}")
