"""Tasks: reading task and data files, prompts, chat templates and labels."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from toy import load_task, make_tokenizer, parity_rows, prompts, task_spec, write_rows

from optimum_sieve.metrics.identity import metric_source
from optimum_sieve.tasks import Example, Task


SPLITS = ("calibration", "selection", "test")


def test_examples_are_rendered_rows(tmp_path: Path) -> None:
    task = load_task(tmp_path)
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
    task = load_task(tmp_path, rows, prompt="{{ text }} {{ row['text'] }}\n")
    assert sorted(prompts(task, "test"))[0].startswith("<b> & '")
    assert all(prompt.endswith("\n") for prompt in prompts(task, "test"))


def test_a_template_may_handle_missing_values_itself(tmp_path: Path) -> None:
    rows = [{"text": f"{i}", "title": None if i % 2 else "T", "label": "odd"} for i in range(12)]
    task = load_task(tmp_path, rows, prompt="{% if title %}{{ title }}: {% endif %}{{ text }}{{ title or '?' }}")
    shown = {prompt for split in SPLITS for prompt in prompts(task, split)}
    assert shown == {f"{i}?" if i % 2 else f"T: {i}T" for i in range(12)}


def test_chat_goes_through_the_chat_template(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Number: {{ text }}"}]
    task = load_task(tmp_path, parity_rows(12), prompt=None, chat=chat)
    for example in task.examples("test", make_tokenizer(chat=True)):
        assert example.prompt.startswith("<s> user : Number: ")
        assert example.prompt.endswith(" assistant :")
        assert not example.add_special_tokens


def test_an_answer_continues_the_assistants_own_message(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Number: {{ text }}"}, {"role": "assistant", "content": "Parity:"}]
    task = load_task(tmp_path, parity_rows(12), prompt=None, chat=chat)
    assert all(
        example.prompt.endswith("assistant : Parity:")
        for example in task.examples("calibration", make_tokenizer(chat=True))
    )


@pytest.mark.parametrize("roles", [("user",), ("user", "assistant")])
def test_chat_needs_a_chat_template(tmp_path: Path, roles: tuple[str, ...]) -> None:
    task = load_task(tmp_path, prompt=None, chat=[{"role": role, "content": "{{ text }}"} for role in roles])
    with pytest.raises(ValueError, match="`chat` must be used with a tokenizer that has a chat template, got one wit"):
        task.examples("calibration", make_tokenizer())


def test_a_chat_template_may_refuse_the_messages(tmp_path: Path) -> None:
    task = load_task(tmp_path, prompt=None, chat=[{"role": "system", "content": "{{ text }}"}])
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
    one = load_task(tmp_path, data={"files": "rows [1].parquet"})
    two = Task.from_dict(task_spec(data={"dataset": "set", "split": "train"}), tmp_path)
    three = Task.from_dict(
        task_spec(data={"dataset": "set", "splits": {"calibration": "train", "selection": "train", "test": "test"}}),
        tmp_path,
    )
    with pytest.raises(ValueError, match=r"`data.dataset` must be a dataset .* got 'set' with split 'dev': .*dev"):
        Task.from_dict(task_spec(data={"dataset": "set", "split": "dev"}), tmp_path)
    assert prompts(one, "test") == prompts(two, "test")
    assert three.splits == {"calibration": 20, "selection": 10, "test": 9}
    assert sorted(Path(os.environ["HF_HOME"]).rglob("*")) == before
    assert sorted(tmp_path.rglob("*")) == sorted([*files, tmp_path / "rows.jsonl", tmp_path / "task.json"])


def test_texts_that_look_like_something_else_stay_texts(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nNA,odd\nNone,even\n2020-01-01,odd\n1.50,odd\n")
    task = load_task(tmp_path, data={"files": {"test": "rows.csv"}}, prompt="{{ text }}")
    assert sorted(prompts(task, "test")) == ["1.50", "2020-01-01", "NA", "None"]
    rows = [{"text": "2020-01-01", "label": "odd"}, {"text": "2020-01-01T00:00:00Z", "label": "odd"}]
    write_rows(tmp_path / "dates.jsonl", rows)
    task = load_task(tmp_path, data={"files": {"test": "dates.jsonl"}}, prompt="{{ text }}")
    assert sorted(prompts(task, "test")) == ["2020-01-01", "2020-01-01T00:00:00Z"]


def test_the_hub_is_asked_for_what_the_task_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **options: Any) -> Any:
        from datasets import Dataset

        asked.append((path, options))
        return Dataset.from_list(parity_rows(30))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = {"dataset": "someone/parity", "name": "small", "revision": "main", "split": "train"}
    assert load_task(tmp_path, data=data).splits == {"calibration": 15, "selection": 8, "test": 7}
    assert asked == [("someone/parity", {"name": "small", "split": "train", "revision": "main"})]


def test_the_fingerprint_follows_the_data(tmp_path: Path) -> None:
    rows = parity_rows(30)
    before = load_task(tmp_path, rows).fingerprint()
    rows[3]["label"] = "odd" if rows[3]["label"] == "even" else "even"
    assert load_task(tmp_path, rows).fingerprint() != before
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
    task = load_task(tmp_path, data={"files": {"test": "rows.jsonl"}})
    assert task.splits == {"test": 120}
    task.require_splits("test")
    message = "`data` must have the splits calibration, test, got none for calibration"
    with pytest.raises(ValueError, match=message):
        task.require_splits("calibration", "test")
    with pytest.raises(ValueError, match=r"`data` must .*got none for selection"):
        task.examples("selection", make_tokenizer())
    wanted = "calibration, selection, test, unlabelled"
    with pytest.raises(ValueError, match=f"`split` must be one of {wanted}, got 'train'"):
        task.examples("train", make_tokenizer())


def plain_metric(answer: str, accepted: tuple[str, ...]) -> float:
    return float(answer in accepted)


def metrics_without_source() -> dict[str, Any]:
    value, written = 2.0, {}
    exec("def metric(answer, accepted): return 1.0", written)

    class Scaled:
        def __call__(self, answer: str, accepted: tuple[str, ...]) -> float:
            return 1.0

        def method(self, answer: str, accepted: tuple[str, ...]) -> float:
            return 1.0

    def closure(answer: str, accepted: tuple[str, ...]) -> float:
        return value

    def default(answer: str, accepted: tuple[str, ...], scale: float = value) -> float:
        return scale

    return {
        "partial": partial(plain_metric),
        "object": Scaled(),
        "method": Scaled().method,
        "closure": closure,
        "default": default,
        "lambda": lambda answer, accepted: 1.0,
        "executed": written["metric"],
    }


def test_a_function_is_identified_by_its_source() -> None:
    assert metric_source("f1") == ["f1"]
    name, code = metric_source(plain_metric) or ["", ""]
    assert (name, code.splitlines()[-1].strip()) == ("plain_metric", "return float(answer in accepted)")


@pytest.mark.parametrize("name", metrics_without_source())
def test_a_metric_whose_source_tells_too_little_is_not_identified(name: str) -> None:
    assert metric_source(metrics_without_source()[name]) is None
