"""Task files: reading, prompts, chat, labels, disjoint splits; and every bad input with its message."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from toy import make_tokenizer, parity_rows, task_spec, write_rows, write_task

from optimum_sieve.tasks import Example, Task


SPLITS = ("calibration", "selection", "test")
SEPARATE = {"files": {split: f"{split}.jsonl" for split in SPLITS}}


def load(directory: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Task:
    return Task.from_file(write_task(directory, rows, **changes))


def prompts(task: Task, split: str) -> list[str]:
    return [example.prompt for example in task.examples(split, make_tokenizer())]


def write_splits(directory: Path, rows: list[dict[str, Any]]) -> None:
    """Write separate files, a third of the rows each."""
    for i, split in enumerate(SPLITS):
        write_rows(directory / f"{split}.jsonl", rows[i::3])


def test_examples_are_rendered_rows(tmp_path: Path) -> None:
    task = load(tmp_path)
    examples = [example for split in SPLITS for example in task.examples(split, make_tokenizer())]
    expected = {
        f"Number: {row['text']} Parity:": Example(
            prompt=f"Number: {row['text']} Parity:",
            answer=f" {row['label']}",
            candidates=(" odd", " even"),
            target=["odd", "even"].index(row["label"]),
        )
        for row in parity_rows(120)
    }
    assert len(examples) == len(expected)
    assert {example.prompt: example for example in examples} == expected
    assert (task.name, task.kind, task.metric) == ("parity", "labels", "accuracy")
    assert task.labels == {"odd": " odd", "even": " even"}


def test_yaml_and_json_task_files_are_the_same_task(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", parity_rows(30))
    (tmp_path / "task.yaml").write_text(
        """
        # A comment.
        name: parity
        kind: labels
        data: {files: rows.jsonl}
        prompt: "Number: {{ text }} Parity:"
        answer: "{{ label }}"
        labels: {odd: " odd", even: " even"}
        """
    )
    (tmp_path / "task.json").write_text(json.dumps(task_spec()))
    one, other = Task.from_file(tmp_path / "task.yaml"), Task.from_file(str(tmp_path / "task.json"))
    assert one.spec == other.spec
    assert one.fingerprint() == other.fingerprint()
    assert Task.from_dict(task_spec(), tmp_path).fingerprint() == one.fingerprint()


def test_yaml_label_names_stay_what_they_look_like(tmp_path: Path) -> None:
    answers = ["yes", "no", "on", "1", "2020-01-01"]
    write_rows(tmp_path / "rows.jsonl", [{"text": f"{i}", "label": answers[i % 5]} for i in range(30)])
    (tmp_path / "task.yaml").write_text(
        'name: t\nkind: labels\ndata: {files: rows.jsonl}\nprompt: "{{ text }}"\nanswer: "{{ label }}"\n'
        'labels: {yes: " yes", no: " no", on: " on", 1: " one", 2020-01-01: " day"}\n'
    )
    assert list(Task.from_file(tmp_path / "task.yaml").labels) == answers


def test_boolean_labels(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": f"{i}", "label": i % 2 == 0} for i in range(30)])
    (tmp_path / "task.yaml").write_text(
        'name: t\nkind: labels\ndata: {files: rows.jsonl}\nprompt: "{{ text }}"\nanswer: "{{ label }}"\n'
        'labels: {true: " yes", false: " no"}\n'
    )
    for example in Task.from_file(tmp_path / "task.yaml").examples("test", make_tokenizer()):
        assert example.answer == (" yes" if int(example.prompt) % 2 == 0 else " no")


def test_prompts_keep_their_trailing_newline_and_are_not_escaped(tmp_path: Path) -> None:
    rows = [{"text": f"<b> & '{i}'", "label": "odd"} for i in range(12)]
    task = load(tmp_path, rows, prompt="{{ text }} {{ row['text'] }}\n")
    assert sorted(prompts(task, "test"))[0].startswith("<b> & '")
    assert all(prompt.endswith("\n") for prompt in prompts(task, "test"))


def test_a_template_may_handle_missing_values_itself(tmp_path: Path) -> None:
    rows = [{"text": f"{i}", "title": None if i % 2 else "T", "label": "odd"} for i in range(12)]
    task = load(tmp_path, rows, prompt="{% if title %}{{ title }}: {% endif %}{{ text }}{{ title or '?' }}")
    shown = {prompt for split in SPLITS for prompt in prompts(task, split)}
    assert shown == {f"{i}?" if i % 2 else f"T: {i}T" for i in range(12)}


def test_chat_goes_through_the_chat_template(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Number: {{ text }}"}]
    task = load(tmp_path, parity_rows(12), prompt=None, chat=chat)
    for example in task.examples("test", make_tokenizer(chat=True)):
        assert example.prompt.startswith("<s> user : Number: ")
        assert example.prompt.endswith(" assistant :")
        assert not example.add_special_tokens


def test_an_answer_continues_the_assistants_own_message(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Number: {{ text }}"}, {"role": "assistant", "content": "Parity:"}]
    task = load(tmp_path, parity_rows(12), prompt=None, chat=chat)
    assert all(
        example.prompt.endswith("assistant : Parity:")
        for example in task.examples("calibration", make_tokenizer(chat=True))
    )


@pytest.mark.parametrize("roles", [("user",), ("user", "assistant")])
def test_chat_needs_a_chat_template(tmp_path: Path, roles: tuple[str, ...]) -> None:
    task = load(tmp_path, prompt=None, chat=[{"role": role, "content": "{{ text }}"} for role in roles])
    with pytest.raises(ValueError, match="`chat` must be used with a tokenizer that has a chat template, got one wit"):
        task.examples("calibration", make_tokenizer())


def test_a_chat_template_may_refuse_the_messages(tmp_path: Path) -> None:
    task = load(tmp_path, prompt=None, chat=[{"role": "system", "content": "{{ text }}"}])
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ValueError, match=r"`chat` must fit the tokenizer's chat template.*system: no system role"):
        task.examples("calibration", tokenizer)


FILES = {
    "rows.jsonl": '{"text": "1", "label": "odd"}\n\n{"text": "2", "label": "even"}\n{"text": "007", "label": "odd"}\n',
    "rows.json": '[{"text": "1", "label": "odd"}, {"text": "2", "label": "even"}, {"text": "007", "label": "odd"}]',
    "rows.csv": "text,label\n1,odd\n2,even\n\n007,odd\n",
    "rows.tsv": "\ufefftext\tlabel\r\n1\todd\r\n2\teven\r\n007\todd\r\n",
}


@pytest.mark.parametrize("name", FILES)
def test_file_formats(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name].encode())
    task = Task.from_dict(task_spec(data={"files": {"test": name}}), tmp_path)
    assert task.splits == {"test": 3}
    assert sorted(prompts(task, "test")) == ["Number: 007 Parity:", "Number: 1 Parity:", "Number: 2 Parity:"]


def test_parquet_and_local_data_sets_leave_no_cache(tmp_path: Path) -> None:
    from datasets import Dataset

    before = sorted(Path(os.environ["HF_HOME"]).rglob("*"))
    (tmp_path / "set").mkdir()
    Dataset.from_list(parity_rows(30)).to_parquet(tmp_path / "rows [1].parquet")
    Dataset.from_list(parity_rows(30)).to_parquet(tmp_path / "set" / "train.parquet")
    Dataset.from_list(parity_rows(9, seed=5)).to_parquet(tmp_path / "set" / "test.parquet")
    files = sorted(tmp_path.rglob("*"))
    one = load(tmp_path, data={"files": "rows [1].parquet"})
    two = Task.from_dict(task_spec(data={"dataset": "set", "split": "train"}), tmp_path)
    three = Task.from_dict(
        task_spec(data={"dataset": "set", "splits": {"calibration": "train", "selection": "train", "test": "test"}}),
        tmp_path,
    )
    with pytest.raises(ValueError, match=r"`data.dataset` must be a data set .* got 'set' with split 'dev': .*dev"):
        Task.from_dict(task_spec(data={"dataset": "set", "split": "dev"}), tmp_path)
    assert prompts(one, "test") == prompts(two, "test")
    assert three.splits == {"calibration": 20, "selection": 10, "test": 9}
    assert sorted(Path(os.environ["HF_HOME"]).rglob("*")) == before
    assert sorted(tmp_path.rglob("*")) == sorted([*files, tmp_path / "rows.jsonl", tmp_path / "task.json"])


def test_texts_that_look_like_something_else_stay_texts(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nNA,odd\nNone,even\n2020-01-01,odd\n1.50,odd\n")
    task = load(tmp_path, data={"files": {"test": "rows.csv"}}, prompt="{{ text }}")
    assert sorted(prompts(task, "test")) == ["1.50", "2020-01-01", "NA", "None"]
    rows = [{"text": "2020-01-01", "label": "odd"}, {"text": "2020-01-01T00:00:00Z", "label": "odd"}]
    write_rows(tmp_path / "dates.jsonl", rows)
    task = load(tmp_path, data={"files": {"test": "dates.jsonl"}}, prompt="{{ text }}")
    assert sorted(prompts(task, "test")) == ["2020-01-01", "2020-01-01T00:00:00Z"]


def test_the_hub_is_asked_for_what_the_task_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **options: Any) -> Any:
        from datasets import Dataset

        asked.append((path, options))
        return Dataset.from_list(parity_rows(30))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = {"dataset": "someone/parity", "name": "small", "revision": "main", "split": "train"}
    assert load(tmp_path, data=data).splits == {"calibration": 15, "selection": 8, "test": 7}
    assert asked == [("someone/parity", {"name": "small", "split": "train", "revision": "main"})]


def test_one_source_is_cut_in_proportion_and_disjoint(tmp_path: Path) -> None:
    task = load(tmp_path)
    assert task.splits == {"calibration": 60, "selection": 30, "test": 30}
    found = [set(prompts(task, split)) for split in SPLITS]
    assert len(set.union(*found)) == 120
    fractions = {"calibration": 1, "selection": 1, "test": 4}
    task = load(tmp_path, data={"files": "rows.jsonl", "fractions": fractions})
    assert task.splits == {"calibration": 20, "selection": 20, "test": 80}


def test_splits_that_name_the_same_file_share_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "other.jsonl", [{"text": "unseen", "label": "odd"}])
    files = {"calibration": "rows.jsonl", "selection": "rows.jsonl", "test": "other.jsonl"}
    task = load(tmp_path, data={"files": files, "fractions": {"calibration": 0.8, "selection": 0.2}})
    assert task.splits == {"calibration": 96, "selection": 24, "test": 1}
    assert not set(prompts(task, "calibration")) & set(prompts(task, "selection"))


def test_duplicate_prompts_stay_in_one_split(tmp_path: Path) -> None:
    rows = [{"text": f"{i % 20}", "label": "odd" if i % 2 else "even", "id": i} for i in range(100)]
    task = load(tmp_path, rows)
    assert sum(task.splits.values()) == 100
    found = [set(prompts(task, split)) for split in SPLITS]
    assert sum(map(len, found)) == 20


def test_groups_stay_in_one_split(tmp_path: Path) -> None:
    # Groups of very different sizes; the prompt "shared" joins groups 1 and 2 for good.
    sizes = [30, 20, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    rows = [
        {"text": "shared" if i == 0 and group in (1, 2) else f"{group} {i}", "label": "odd", "group": group}
        for group, size in enumerate(sizes)
        for i in range(size)
    ]
    task = load(tmp_path, rows, group="group", prompt="{{ text }} group {{ group if text != 'shared' }}")
    owner: dict[str, str] = {}
    for split in SPLITS:
        for prompt in prompts(task, split):
            if not prompt.startswith("shared"):
                group = prompt.split()[0]
                group = "1" if group == "2" else group
                assert owner.setdefault(group, split) == split
    assert len(owner) == len(sizes) - 1
    assert sum(task.splits.values()) == len(rows)
    assert abs(task.splits["calibration"] - len(rows) / 2) <= 3


def test_limit_takes_the_first_of_a_seeded_shuffle(tmp_path: Path) -> None:
    write_splits(tmp_path, parity_rows(120))
    whole = load(tmp_path, data=SEPARATE)
    few = load(tmp_path, data=SEPARATE, limit={"calibration": 7, "test": 1000})
    assert few.splits == {"calibration": 7, "selection": 40, "test": 40}
    assert prompts(few, "calibration") == prompts(whole, "calibration")[:7]
    assert prompts(few, "test") == prompts(whole, "test")
    in_file = [f"Number: {row['text']} Parity:" for row in parity_rows(120)[0::3]]
    assert prompts(whole, "calibration") != in_file
    assert sorted(prompts(whole, "calibration")) == sorted(in_file)


@pytest.mark.parametrize("data", [{"files": "rows.jsonl"}, SEPARATE])
def test_the_seed_decides_and_the_rest_is_reproducible(tmp_path: Path, data: dict[str, Any]) -> None:
    write_splits(tmp_path, parity_rows(120))
    one, same, other = (load(tmp_path, data=data, seed=seed) for seed in (1, 1, 2))
    for split in SPLITS:
        assert prompts(one, split) == prompts(same, split)
        assert prompts(one, split) != prompts(other, split)
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_the_fingerprint_follows_the_data(tmp_path: Path) -> None:
    rows = parity_rows(30)
    before = load(tmp_path, rows).fingerprint()
    rows[3]["label"] = "odd" if rows[3]["label"] == "even" else "even"
    assert load(tmp_path, rows).fingerprint() != before
    assert len(before) == 64


def test_spec_is_plain_json(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": f"{i}", "label": i % 2} for i in range(12)])
    spec = task_spec(data={"files": tmp_path / "rows.jsonl"}, labels={0: " even", 1: " odd"})
    task = Task.from_dict(spec)
    assert json.loads(json.dumps(task.spec)) == task.spec
    assert task.labels == {"0": " even", "1": " odd"}
    task.spec["name"] = "changed"
    assert spec["name"] == "parity"


def test_a_task_may_have_a_test_split_alone(tmp_path: Path) -> None:
    task = load(tmp_path, data={"files": {"test": "rows.jsonl"}})
    assert task.splits == {"test": 120}
    task.require_splits("test")
    message = "`data` must have the splits calibration, test, got none for calibration"
    with pytest.raises(ValueError, match=message):
        task.require_splits("calibration", "test")
    with pytest.raises(ValueError, match="got none for selection"):
        task.examples("selection", make_tokenizer())
    with pytest.raises(ValueError, match="`split` must be one of calibration, selection, test, got 'train'"):
        task.examples("train", make_tokenizer())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"promt": "x"}, ValueError, r"`task` must have known keys only, got 'promt'. Did you mean `prompt`\?"),
        ({"zzz": 1}, ValueError, r"got 'zzz'. Known keys: name, kind, data"),
        ({"name": None}, ValueError, r"`name` must be given in the task file: a text"),
        ({"name": 3}, TypeError, r"`name` must be a text, got 3"),
        ({"kind": None}, ValueError, r"`kind` must be given"),
        ({"kind": "label"}, ValueError, r"`kind` must be one of labels, got 'label'"),
        ({"metric": "accurate"}, ValueError, r"`metric` must be one of accuracy, macro_f1, got 'accurate'"),
        ({"prompt": None}, ValueError, r"`prompt` or `chat` must be given, exactly one of them, got neither"),
        ({"chat": []}, ValueError, r"exactly one of them, got both"),
        ({"prompt": 3}, TypeError, r"`prompt` must be a text, got 3. For messages use `chat`"),
        ({"prompt": None, "chat": []}, TypeError, r"`chat` must be a list of messages"),
        ({"prompt": None, "chat": ["hello"]}, TypeError, r"`chat\[0\]` must be a mapping with `role` and `content`"),
        (
            {"prompt": None, "chat": [{"role": "user", "contents": "x"}]},
            ValueError,
            r"`chat\[0\]` must have known keys only, got 'contents'. Did you mean `content`\?",
        ),
        ({"prompt": None, "chat": [{"role": "user"}]}, TypeError, r"`chat\[0\].content` must be a text, got None"),
        ({"prompt": "{{ text }"}, ValueError, r"`prompt` must be a valid jinja2 template, got .*\(line 1\)"),
        ({"answer": "{% if %}"}, ValueError, r"`answer` must be a valid jinja2 template"),
        (
            {"prompt": "{{ txt }}"},
            ValueError,
            r"`prompt` must name fields of the data, got 'txt' for row \d+ of rows.jsonl. Did you mean 'text'\? "
            r"Its fields are: text, label",
        ),
        (
            {"prompt": None, "chat": [{"role": "user", "content": "{{ Q }}"}]},
            ValueError,
            r"`chat\[0\].content` must name fields of the data, got 'Q'",
        ),
        ({"answer": "{{ gold }}"}, ValueError, r"`answer` must name fields of the data, got 'gold'"),
        ({"prompt": "{{ text.a.b }}"}, ValueError, r"`prompt` must render for every row, got UndefinedError for row"),
        ({"prompt": "{{ text.__class__ }}"}, ValueError, r"`prompt` must render for every row, got SecurityError"),
        ({"prompt": "{{ 1 / 0 }}"}, ValueError, r"`prompt` must render for every row, got ZeroDivisionError"),
        ({"prompt": "{{ row.nothing }}"}, ValueError, r"got UndefinedError .*has no attribute 'nothing'"),
        ({"prompt": " {{ '' }}\n"}, ValueError, r"`prompt` must not be empty, got ' \\n' for row \d+ of rows.jsonl"),
        ({"answer": None}, ValueError, r"`answer` must be given in the task file"),
        (
            {"answer": "{{ label }}!"},
            ValueError,
            r"`answer` must be one of the labels 'odd', 'even', got '(odd|even)!' in row \d+ of rows.jsonl",
        ),
        ({"labels": None}, ValueError, r"`labels` must be given in the task file: a mapping"),
        ({"labels": ["odd", "even"]}, TypeError, r"`labels` must be a mapping from each label"),
        ({"labels": {"odd": " odd"}}, ValueError, r"`labels` must name at least two labels, got \['odd'\]"),
        ({"labels": {"odd": 1, "even": 2}}, TypeError, r"`labels.odd` must be a text, got 1. Put it in quotes"),
        ({"labels": {"odd": "", "even": "x"}}, ValueError, r"`labels.odd` must not be empty"),
        ({"labels": {"odd": " x", "even": " x"}}, ValueError, r"`labels` must have distinct texts, got \[' x', ' x'\]"),
        ({"limit": 5}, TypeError, r"`limit` must be a mapping from calibration, selection, test"),
        ({"limit": {"train": 5}}, ValueError, r"`limit` must have known keys only, got 'train'"),
        ({"limit": {"test": 0}}, ValueError, r"`limit.test` must be a whole number of at least 1, got 0"),
        ({"limit": {"test": True}}, ValueError, r"`limit.test` must be a whole number of at least 1, got True"),
        ({"seed": -1}, ValueError, r"`seed` must be a whole number of at least 0, got -1"),
        ({"group": 3}, TypeError, r"`group` must be the name of a field, got 3"),
        ({"group": "author"}, ValueError, r"`group` must name a field of the data, got 'author' for row 1 of rows"),
        ({"data": None}, ValueError, r"`data` must be given in the task file"),
        ({"data": "rows.jsonl"}, TypeError, r"`data` must be a mapping with `files` or `dataset`, got 'rows.jsonl'"),
        ({"data": {}}, ValueError, r"`data` must have `files` or `dataset`, exactly one of them, got neither"),
        ({"data": {"files": "a", "dataset": "b"}}, ValueError, r"exactly one of them, got both"),
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
        ({"data": {"dataset": "a"}}, ValueError, r"`data` must have `split` \(cut by seed\) or `splits`.*got neither"),
        ({"data": {"dataset": "a", "split": "b", "splits": {"test": "c"}}}, ValueError, r"`splits`.*got both"),
        ({"data": {"dataset": "", "split": "b"}}, ValueError, r"`data.dataset` must be a Hub id or a directory"),
        ({"data": {"dataset": "a", "name": 3, "split": "b"}}, TypeError, r"`data.name` must be a text, got 3"),
        (
            {"data": {"dataset": "someone/nothing", "split": "train"}},
            ValueError,
            r"`data.dataset` must be a data set that `datasets.load_dataset` can load, got 'someone/nothing'",
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
            r"`data.fractions.test` must be a number above 0, got 0",
        ),
    ],
)
def test_bad_task_files(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(tmp_path, **changes)
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
    with pytest.raises(TypeError, match=r"`task.seed` must be a text, number, list or mapping, got set"):
        Task.from_dict(task_spec(seed={1}))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"text": "1"}\n{"text":\n', r"got an error in 'rows.jsonl': line 2 is no JSON"),
        ("rows.jsonl", '{"text": "1"}\n"2"\n', r"line 2 is no object but str"),
        ("rows.json", '[{"text": "1"}, 2]', r"item 2 is no object but int"),
        ("rows.json", '[{"text": "1"}', r"got an error in 'rows.json'"),
        ("rows.csv", "text,label\nfine,odd\none, two,odd\n", r"line 3 has 3 cells, the header 2; a text with a comma"),
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
        load(tmp_path, rows)
    rows[4] |= {"text": "4", "label": None}
    with pytest.raises(ValueError, match="`answer` must not print a missing value, got one for label in row 5 of rows"):
        load(tmp_path, rows)
    rows[4] = {"text": {"inner": None}, "label": "odd"}
    with pytest.raises(ValueError, match="`prompt` must not print a missing value, got one for text in row 5 of rows"):
        load(tmp_path, rows, prompt="{{ text.inner if text.inner is defined else text }}")


def test_a_group_must_have_a_value_in_every_row(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{**row, "author": i % 9} for i, row in enumerate(parity_rows(20))]
    rows[6]["author"] = None
    with pytest.raises(ValueError, match=r"a value in every row, got none for 'author' in row 7 of rows.jsonl"):
        load(tmp_path, rows, group="author")


def test_overlapping_splits_are_refused(tmp_path: Path) -> None:
    rows = parity_rows(30)
    write_splits(tmp_path, rows)
    write_rows(tmp_path / "test.jsonl", [*rows[2::3], rows[1], rows[4], rows[0]])
    with pytest.raises(
        ValueError,
        match=r"disjoint splits, got 2 rows of test whose prompt is in selection too \(the first: row \d+ of "
        r"test.jsonl and row \d of selection.jsonl\). Remove them|got 1 rows of test whose prompt is in calibration",
    ):
        load(tmp_path, data=SEPARATE)


def test_rows_beyond_the_limit_may_overlap(tmp_path: Path) -> None:
    rows = parity_rows(60)
    write_splits(tmp_path, rows)
    used = load(tmp_path, data=SEPARATE, limit={"test": 5})
    unused = next(row for row in rows[2::3] if f"Number: {row['text']} Parity:" not in prompts(used, "test"))
    write_rows(tmp_path / "calibration.jsonl", [*rows[0::3], unused])
    assert load(tmp_path, data=SEPARATE, limit={"test": 5}).splits["calibration"] == 21
    with pytest.raises(ValueError, match="got 1 rows of test whose prompt is in calibration too"):
        load(tmp_path, data=SEPARATE)


def test_groups_in_separate_files_must_be_disjoint(tmp_path: Path) -> None:
    write_splits(tmp_path, [{**row, "author": f"a{i // 4}"} for i, row in enumerate(parity_rows(30))])
    load(tmp_path, data=SEPARATE)
    with pytest.raises(ValueError, match="whose value of 'author' is in calibration too"):
        load(tmp_path, data=SEPARATE, group="author")


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (parity_rows(2), {}, r"got none for test: the 2 rows of rows.jsonl make 2 sets that must stay together"),
        ([{"text": "1", "label": "odd"}] * 9, {}, r"the 9 rows of rows.jsonl make 1 sets .*\(same prompt\)"),
        (
            [{**row, "author": i % 2} for i, row in enumerate(parity_rows(20))],
            {"group": "author"},
            r"make 2 sets that must stay together \(same prompt or value of 'author'\)",
        ),
    ],
)
def test_a_split_may_not_be_empty(tmp_path: Path, rows: list[Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, rows, **changes)
