"""Task files and data of any size, depth and encoding: read, or refused at once in one short message."""

from __future__ import annotations

import json
import os
import unicodedata
from typing import TYPE_CHECKING, Any

import pytest
from toy import load_task, make_tokenizer, parity_rows, prompts, task_spec, write_rows

from optimum_sieve.metrics.text_metrics import items, score_texts
from optimum_sieve.tasks import Task


if TYPE_CHECKING:
    from pathlib import Path


NFC, NFD = "caf\u00e9", "cafe\u0301"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 10)}]}}\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
VALUES = "must hold at most 100,000 values, nested at most 32 deep, with aliases written out"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("task.yaml", BOMB, f"it {VALUES}"),
        ("task.yaml", MERGES, f"it {VALUES}"),
        ("task.yaml", "labels: &a\n  odd: *a\n", f"it {VALUES}"),
        ("task.yaml", "stop: &a [*a]\n", f"it {VALUES}"),
        ("task.yaml", "a: &a {<<: *a}\n", f"it {VALUES}"),
        ("task.yaml", "a: " + "[" * 50 + "]" * 50, f"it {VALUES}"),
        ("task.yaml", "a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("task.yaml", "a: " + "[" * 5000, "nested too deeply"),
        ("task.json", '{"a": ' + "[" * 100_000, "nested too deeply"),
        ("task.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ("task.yaml", "a: " + "9" * 5000, "4300 digits"),
        ("task.json", '{"a": ' + "9" * 5000 + "}", "4300 digits"),
        ("task.yaml", "name: " + "x" * 2**20, "it has 1,048,582 bytes, more than 1,048,576; put rows into a file"),
        ("task.yaml", '!!int "": x', "string index out of range"),
        ("task.yaml", "a: !!bool x", "'x'"),
        ("task.yaml", "a: !!timestamp x", "NoneType"),
        ("task.yaml", "[a]: x", "found unhashable key"),
        ("task.yaml", "a: \x00", "special characters are not allowed"),
        ("task.yaml", "a: 1\n---\nb: 2", "expected a single document"),
    ],
)
def test_task_files_that_would_not_end(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(
        ValueError, match=rf"(?s)^`task` must be a valid YAML or JSON file, got an error in .*{name}: .*{message}"
    ):
        Task.from_file(tmp_path / name)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_many_unknown_keys_end_at_the_first(tmp_path: Path, suffix: str) -> None:
    spec = {f"key {i}": 1 for i in range(20_000)} | {"kind": "labels"}
    path = tmp_path / f"task{suffix}"
    path.write_text(
        json.dumps(spec, indent=0) if suffix == ".json" else "".join(f"{k}: {v}\n" for k, v in spec.items())
    )
    with pytest.raises(
        ValueError, match=r"`task` must have known keys only, got 'key 0'\. Known keys: name, kind"
    ) as raised:
        Task.from_file(path)
    assert len(str(raised.value)) < 500


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def test_dictionaries_have_the_bounds_of_files() -> None:
    cyclic: dict[str, Any] = {}
    cyclic["a"] = cyclic
    doubled: list[Any] = [1]
    for _ in range(60):
        doubled = [doubled, doubled]
    for value in (cyclic, nested(5000), nested(40), list(range(100_001))):
        with pytest.raises(ValueError, match=f"`task.labels[a.]*` {VALUES}"):
            Task.from_dict(task_spec(labels=value))
    with pytest.raises(ValueError, match=f"`task.labels` {VALUES}"):
        Task.from_dict(task_spec(labels=doubled))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seed": 10**400},
            "`task.seed` must be at most 9,223,372,036,854,775,807, got an integer of about 400 digits",
        ),
        ({"seed": -(10**5000)}, "`task.seed` must be at most .* got an integer of about 5,000 digits"),
        ({"labels": {10**5000: "x"}}, "`task.labels` must be at most .* got an integer of about 5,000 digits"),
        ({"seed": float("inf")}, "`task.seed` must be a finite number, got inf"),
        (
            {"labels": {1: "x", "1": "y"}},
            "`task.labels` must have keys that differ as texts, got 1, 1. Put them in quotes",
        ),
        (
            {"prompt": "{{ text }} \ud800"},
            r"`task.prompt` must be valid Unicode, got a lone surrogate in '{{ text }} \\ud800'",
        ),
        (
            {"labels": {"odd\udc80": " x", "even": " y"}},
            r"`task.labels` must be valid Unicode, got a lone surrogate in 'odd\\udc",
        ),
        (
            {"labels": {"odd": "\udfff", "even": " y"}},
            r"`task.labels.odd` must be valid Unicode, got a lone surrogate in '\\udfff'",
        ),
        ({"name": "x\ud800"}, r"`task.name` must be valid Unicode, got a lone surrogate in 'x\\ud800'"),
        (
            {"prompt": r"{{ text }} {{ '\ud800' }}"},
            r"`prompt` must render to valid Unicode, got the lone surrogate '\\ud800' in row",
        ),
        ({"kind": "x" * 50_000}, r"`kind` must be one of labels, choices, generate, got 'xxx.{100,200}'\.$"),
        ({"x" * 50_000: 1}, r"`task` must have known keys only, got 'xxx.{100,200}'\. Known keys: name"),
        (
            {"prompt": "{{ text }}" + "{{ x" * 5000},
            r"`prompt` must be a valid jinja2 template, got '{{ text }}.{100,250}: ",
        ),
        (
            {"data": {"files": "x" * 5000 + ".jsonl"}},
            r"`data.files` must name existing files, got 'xxx.{100,400} does not exist",
        ),
        ({"data": {"files": "a\0b.jsonl"}}, r"`data.files` must name existing files, got 'a\\x00b.jsonl'"),
        (
            {"data": {"files": "rows.jsonl", "fractions": dict.fromkeys(("calibration", "selection", "test"), 2**62)}},
            "`data.fractions.calibration` must be a number above 0 and at most 1,000,000,000, got 4611686018427387904",
        ),
        (
            {"limit": {"test": 10**30}},
            "`task.limit.test` must be at most 9,223,372,036,854,775,807, got 1000000000000000",
        ),
        (
            {"kind": "generate", "labels": None, "max_new_tokens": 10**9},
            "`max_new_tokens` must be at most 1,000,000, got 1,000,000,000",
        ),
    ],
)
def test_values_out_of_bounds(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_rows(tmp_path / "rows.jsonl", parity_rows(20))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        Task.from_dict(task_spec(**changes), tmp_path)
    assert len(str(raised.value)) < 700


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "x\ud800", "label": "odd"},
            r"`prompt` must render to valid Unicode, got the lone surrogate '\\ud800' in row 3 of",
        ),
        (
            {"text": "x", "label": "\udcff"},
            r"`answer` must render to valid Unicode, got the lone surrogate '\\udcff' in row 3 of",
        ),
        (
            {"text": "1", "label": "x" * 50_000},
            r"`answer` must be one of the labels 'odd', 'even', got 'xxx.{100,200}' in row 3 of",
        ),
    ],
)
def test_rows_that_no_tokenizer_takes(tmp_path: Path, row: dict[str, str], message: str) -> None:
    rows = parity_rows(20)
    rows[2] = row
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path, rows)


def test_a_surrogate_in_a_choice_or_in_an_accepted_answer(tmp_path: Path) -> None:
    rows = [{"text": f"{i}", "all": ["a", "b\ud800"], "label": "a"} for i in range(12)]
    choices = {
        "kind": "choices",
        "labels": None,
        "choices": "{{ all }}",
        "answer": "{{ label }}",
        "candidate": "{{ choice }}",
    }
    with pytest.raises(
        ValueError, match=r"`choices` must render to valid Unicode, got the lone surrogate '\\ud800' in row"
    ):
        load_task(tmp_path, rows, **choices)
    with pytest.raises(
        ValueError, match=r"`answer` must render to valid Unicode, got the lone surrogate '\\ud800' in row"
    ):
        load_task(tmp_path, rows, kind="generate", labels=None, answer="{{ all }}", max_new_tokens=3)


TABLE = {"text": {str(i): f"{i}" for i in range(30)}, "label": {str(i): "odd" for i in range(30)}}
RECORDS = r"write it with `df.to_json\(path, orient=\"records\", lines=True\)`"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TABLE, rf"it holds columns \(text, label\) and no rows; {RECORDS}"),
        (
            {name: list(column.values()) for name, column in TABLE.items()},
            rf"it holds columns \(text, label\) .*{RECORDS}",
        ),
        (
            {"columns": ["text"], "index": [0], "data": [["1"]]},
            rf"it holds one object \(columns, index, data\) .*{RECORDS}",
        ),
        (
            {"schema": {"fields": []}, "data": [{"text": "1"}]},
            rf"it holds one object \(schema, data\) and no rows; {RECORDS}",
        ),
        ([["1", "odd"], ["2", "even"]], "item 1 is not an object but list"),
    ],
)
def test_tables_of_columns_are_named(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "table.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^`data.files` must be well-formed, got an error in 'table.json': {message}"):
        load_task(tmp_path, data={"files": "table.json"})


def test_a_file_of_one_row_is_a_file_of_rows(tmp_path: Path) -> None:
    rows = parity_rows(12)
    write_rows(tmp_path / "one.jsonl", [{**rows[0], "tags": ["a", "b"], "source": {"year": 1}}])
    write_rows(tmp_path / "test.jsonl", rows[1:])
    assert (
        load_task(tmp_path, data={"files": {"calibration": "one.jsonl", "test": "test.jsonl"}}).splits["calibration"]
        == 1
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "rows.csv",
            "text;label\n1;odd\n",
            "the header is one column, 'text;label', and .* is a comma, not a semicolon; write",
        ),
        (
            "rows.csv",
            "text\tlabel\n1\todd\n",
            r"the header is one column, 'text\\tlabel', and .* is a comma, not a tab; write it",
        ),
        (
            "rows.csv",
            "text|label\n1|odd\n",
            r"the header is one column, 'text\|label', and .* is a comma, not a vertical bar",
        ),
        (
            "rows.tsv",
            "text,label\n1,odd\n",
            r"the header is one column, 'text,label', and .* is a tab, not a comma; .*sep=chr\(9\)",
        ),
        ("rows.jsonl", "[" * 100_000 + "\n", "it is nested too deeply"),
        ("rows.jsonl", '{"text": ' + "[" * 100_000 + "\n", "line 1 is not valid JSON: it is nested too deeply"),
        ("rows.jsonl", '{"text": ' + "9" * 5000 + "}\n", "line 1 is not valid JSON: .*4300 digits"),
        ("rows.csv", ",".join(["x"] * 9999) + "\n", "the header names a column twice: x, x, .*9,999 in all"),
        ("rows.csv", "text,label\n" + "x" * 200_000 + ",odd\n", "field larger than field limit"),
    ],
)
def test_data_files_that_are_something_else(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(
        ValueError, match=f"^`data.files` must be well-formed, got an error in '{name}': {message}"
    ) as raised:
        Task.from_dict(task_spec(data={"files": {"test": name}}), tmp_path)
    assert len(str(raised.value)) < 700


def test_links_that_lead_to_themselves_and_special_files(tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("loop.jsonl", "pipe.jsonl"):
        with pytest.raises(
            FileNotFoundError, match=f"`data.files` must name existing files, got '{name}': .* is no regular"
        ):
            Task.from_dict(task_spec(data={"files": name}), tmp_path)
    for name in ("loop.yaml", "pipe.yaml", "x" * 5000):
        with pytest.raises(
            FileNotFoundError, match=f"`task` must be an existing task file .*, not a pipe, got .*{name[:9]}"
        ):
            Task.from_file(tmp_path / name)


def dataset_error(tmp_path: Path, dataset: str, message: str) -> None:
    spec = task_spec(data={"dataset": dataset, "split": "train"})
    with pytest.raises(ValueError, match=f"`data.dataset` must be a directory of {message}"):
        Task.from_dict(spec, tmp_path / "tasks")


def test_a_directory_that_never_ends_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *unused, **options: pytest.fail("the directory was searched"))
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", parity_rows(20))
    (data / "again").symlink_to(".")
    dataset_error(
        tmp_path, "../data", "regular files, without links to a directory above, got .*again' in '../data'. Remove"
    )
    (data / "again").unlink()
    (data / "deeper").mkdir()
    (data / "deeper" / "top").symlink_to("../..")
    dataset_error(
        tmp_path, "../data", "regular files, without links to a directory above, got .*top' in '../data'. Remove"
    )
    (data / "deeper" / "top").unlink()
    os.mkfifo(data / "more.jsonl")
    dataset_error(tmp_path, "../data", "regular files, .* got .*more.jsonl' in '../data'. Remove")
    (data / "more.jsonl").unlink()
    monkeypatch.setattr("optimum_sieve.tasks.data._MOST_ENTRIES", 20)
    for i in range(20):
        (data / f"{i}.txt").touch()
    dataset_error(tmp_path, "../data", "at most 20 files, got more in '../data'. Name the directory of the data alone")
    dataset_error(tmp_path, "..", r"at most 20 files, got more in '\.\.'. Name the directory of the data alone")


def test_a_directory_with_a_link_to_its_file_is_a_data_set(tmp_path: Path) -> None:
    write_rows(tmp_path / "blob", parity_rows(20))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").symlink_to("../blob")
    task = Task.from_dict(task_spec(data={"dataset": "data", "split": "train"}), tmp_path)
    assert sum(task.splits.values()) == 20


@pytest.mark.parametrize(("in_data", "in_file"), [(NFC, NFD), (NFD, NFC)])
def test_labels_are_equal_in_every_unicode_form(tmp_path: Path, in_data: str, in_file: str) -> None:
    rows = [{"text": f"{i}", "label": in_data if i % 2 else "bar"} for i in range(30)]
    task = load_task(tmp_path, rows, labels={in_file: " yes", "bar": " no"}, prompt="{{ text }}")
    answers = {row["text"]: " yes" if row["label"] == in_data else " no" for row in rows}
    assert {e.prompt: e.answer for e in task.examples("test", make_tokenizer())}.items() <= answers.items()


@pytest.mark.parametrize("labels", [{NFC: " x", NFD: " y"}, {"a": NFC, "b": NFD}])
def test_labels_that_look_alike_are_not_two(tmp_path: Path, labels: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"`labels` must have distinct (names|texts), got"):
        load_task(tmp_path, labels=labels)


def test_choices_and_written_answers_are_equal_in_every_unicode_form(tmp_path: Path) -> None:
    rows = [{"text": f"{i}", "label": NFD} for i in range(12)]
    spec = {"kind": "choices", "labels": None, "answer": "{{ label }}", "candidate": "{{ choice }}"}
    assert load_task(tmp_path, rows, choices=[NFC, "bar"], **spec).splits["test"] == 3
    with pytest.raises(ValueError, match="`choices` must be distinct texts, none empty, got"):
        load_task(tmp_path, rows, choices=[NFC, NFD], **spec)
    for metric in ("exact_match", "f1", "rougeL", "set_f1", "entity_f1"):
        assert score_texts(metric, [NFD, "x"], [[NFC], ["x"]]).score == 1.0


def test_prompts_of_two_splits_differ_in_more_than_their_unicode_form(tmp_path: Path) -> None:
    for name, form in (("calibration", "NFC"), ("test", "NFD")):
        rows = [{"text": unicodedata.normalize(form, f"{NFC} {i}"), "label": "odd"} for i in range(9)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(
        ValueError, match="`data` must have disjoint splits, got 9 rows of test whose prompt is in calibration"
    ):
        load_task(tmp_path, data={"files": {"calibration": "calibration.jsonl", "test": "test.jsonl"}})


@pytest.mark.parametrize(
    ("fields", "used", "hint"),
    [
        (("text", "label"), "{{ txt }}", "Did you mean 'text'"),
        (("Text", "label"), "{{ text }}", "Did you mean 'Text'"),
        (("my text", "label"), "{{ my_text }}", "Did you mean 'my text'"),
        # Another column, not a misspelling.
        (("text1", "text2", "label"), "{{ text3 }}", None),
        (("question1", "label"), "{{ question1 }} {{ question2 }}", None),
        (("text", "label"), "{{ text }} {{ texts }}", None),
        # Two columns are equally close.
        (("cats", "bats", "label"), "{{ rats }}", None),
        (
            (NFD, "label"),
            f"{{{{ {NFC} }}}}",
            r"The field 'cafe\\u0301' has other Unicode code points than 'caf\\xe9'; copy",
        ),
    ],
)
def test_a_suggestion_is_the_column_that_is_meant(
    tmp_path: Path, fields: tuple[str, ...], used: str, hint: str | None
) -> None:
    rows = [{**dict.fromkeys(fields, f"{i}"), "label": "odd"} for i in range(12)]
    with pytest.raises(
        ValueError, match=r"`prompt` must name fields of the data, got '.*' in row .* of rows.jsonl\."
    ) as raised:
        load_task(tmp_path, rows, prompt=used)
    message = str(raised.value)
    assert hint is None or hint.replace("\\\\", "\\") in message
    assert hint is not None or ("Did you mean" not in message and "Its fields are: " in message)


def test_rows_of_many_fields_make_a_short_message(tmp_path: Path) -> None:
    rows = [{**{f"field {i} {'x' * 50}": 1 for i in range(3000)}, "text": f"{n}", "label": "odd"} for n in range(9)]
    with pytest.raises(
        ValueError, match=r"`prompt` must name fields of the data, got 'nothing' .* \(3,002 in all\)\."
    ) as raised:
        load_task(tmp_path, rows, prompt="{{ nothing }}")
    assert len(str(raised.value)) < 2500


def test_texts_that_a_model_writes_without_end_are_scored() -> None:
    for text in ("[" * 100_000, "[" + "9" * 5000 + "]", '[{"a": ' * 9999):
        assert items(text).total() >= 1
        assert score_texts("entity_f1", [text, "x"], [["y"], ["x"]]).score > 0


def test_prompts_keep_the_code_points_of_the_data(tmp_path: Path) -> None:
    rows = [{"text": f"{NFD} {i}", "label": "odd"} for i in range(12)]
    assert all(NFD in prompt for prompt in prompts(load_task(tmp_path, rows), "test"))
