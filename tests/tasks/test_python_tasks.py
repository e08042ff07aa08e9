"""Tasks made in Python: rows of `datasets` or lists, and functions in place of templates."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from toy import load_task, make_model, make_tokenizer, parity_rows, prompts, task_spec, unhealed
from transformers import pipeline

from optimum_sieve import SievePruner, Task
from optimum_sieve.publish.recipe import Recipe
from optimum_sieve.tasks.rows.memory import splits_of
from optimum_sieve.tasks.templates.python_values import only_in_python


SPLITS = ("calibration", "selection", "test")
TEMPLATES = {
    "prompt": "Number: {{ text }} Parity:",
    "answer": "{{ label }}",
    "labels": {"odd": " odd", "even": " even"},
}


def ask(row: dict[str, Any]) -> str:
    return f"Number: {row['text']} Parity:"


def rendered(task: Task) -> dict[str, Any]:
    return {split: task.examples(split, make_tokenizer()) for split in task.splits}


def test_rows_in_memory_are_divided_as_those_of_a_file(tmp_path):
    expected = rendered(load_task(tmp_path))
    rows = parity_rows(120)
    for data in (rows, tuple(rows), Dataset.from_list(rows), {"rows": Dataset.from_list(rows)}):
        task = Task(data=data, **TEMPLATES)
        assert rendered(task) == expected
        assert (task.name, task.kind, task.metric) == ("task", "labels", "accuracy")
        assert task.spec["data"] == {"rows": {"data": 120}, "splits": "data"}


def test_functions_give_what_templates_give(tmp_path):
    written = load_task(tmp_path)
    task = Task(data=parity_rows(120), **{**TEMPLATES, "prompt": ask, "answer": lambda row: row["label"]})
    assert rendered(task) == rendered(written)
    assert task.labelled
    assert task.spec["prompt"] == {"function": "ask"}
    assert only_in_python(written.spec) == {}
    assert only_in_python(task.spec) == {
        "prompt": "the function ask",
        "answer": f"the function {test_functions_give_what_templates_give.__name__}.<locals>.<lambda>",
        "data": "120 rows in memory",
    }


def test_a_task_is_known_by_what_its_functions_return():
    upper = Task(data=parity_rows(40), **{**TEMPLATES, "prompt": lambda row: ask(row).upper()})
    lower = Task(data=parity_rows(40), **{**TEMPLATES, "prompt": lambda row: ask(row).lower()})
    again = Task(data=parity_rows(40), **{**TEMPLATES, "prompt": lambda row: ask(row).lower()})
    assert upper.fingerprint() != lower.fingerprint() == again.fingerprint()


def test_class_labels_are_named_by_their_number():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["odd", "even"])})
    dataset = Dataset.from_list(parity_rows(40), features=features)
    task = Task(data=dataset, prompt=ask, answer=lambda row: row["label"], labels={0: " odd", 1: " even"})
    number = {" odd": 1, " even": 0}
    for example in task.examples("test", make_tokenizer()):
        assert int(example.prompt.split()[-2]) % 2 == number[example.answer]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train", "validation", "test"], ["train", "validation", "test"]),
        (["train", "test"], ["train", "train", "test"]),
        (["train", "dev"], ["train", "train", "dev"]),
        (["validation", "test"], ["validation", "validation", "test"]),
        (["train"], ["train", "train", "train"]),
        (["test"], ["test", "test", "test"]),
    ],
)
def test_splits_of_a_data_set(names, splits):
    assert list(splits_of(names).values()) == splits
    rows = iter(parity_rows(40 * len(names)))
    data = DatasetDict({name: Dataset.from_list([next(rows) for _ in range(40)]) for name in names})
    task = Task(data=data, **TEMPLATES)
    assert sum(task.splits.values()) == 40 * len(names)
    texts = {name: {ask(row) for row in dataset} for name, dataset in data.items()}
    for split, name in zip(SPLITS, splits, strict=True):
        assert set(prompts(task, split)) <= texts[name]


def test_splits_may_be_named_and_shared():
    rows = parity_rows(100)
    unlabelled = [{"text": f"{i} {i} {i} {i}"} for i in range(7)]
    data = {"calibration": rows[:50], "selection": rows[50:70], "test": rows[70:], "unlabelled": unlabelled}
    assert Task(data=data, **TEMPLATES).splits == {"calibration": 50, "selection": 20, "test": 30, "unlabelled": 7}
    data = {
        "rows": DatasetDict({"part_a": Dataset.from_list(rows[:60]), "part_b": Dataset.from_list(rows[60:])}),
        "splits": {"calibration": "part_a", "selection": "part_a", "test": "part_b"},
        "fractions": {"calibration": 1, "selection": 3},
    }
    assert Task(data=data, **TEMPLATES, limit={"test": 9}).splits == {"calibration": 15, "selection": 45, "test": 9}


def test_choices_answers_and_messages_may_be_functions():
    rows = [{"question": f"Which is {i}?", "right": i, "wrong": [i + 1, i + 2]} for i in range(24)]
    task = Task(
        data=rows,
        chat=[
            {"role": "user", "content": lambda row: f"{row['question']}\n{row['lettered_choices']}"},
            {"role": "assistant", "content": "Answer :"},
        ],
        choices=lambda row: [row["right"], *row["wrong"]],
        answer=lambda row: 0,
        shuffle=True,
    )
    assert task.kind == "choices"
    for example in task.examples("test", make_tokenizer(chat=True)):
        number = example.prompt.split("Which is ")[1].split("?")[0]
        assert re.search(rf"{example.candidates[example.target]}\. {number}\b", example.prompt)

    written = Task(data=rows, prompt=lambda row: row["question"], answer=lambda row: row["wrong"], max_new_tokens=3)
    assert written.kind == "generate"
    for example in written.examples("test", make_tokenizer()):
        number = int(example.prompt.split()[-1].rstrip("?"))
        assert example.accepted == (str(number + 1), str(number + 2))


def test_a_dictionary_may_hold_what_the_constructor_takes():
    spec = {**task_spec(prompt=ask), "data": parity_rows(40)}
    task = SievePruner.from_pretrained(make_model(), tokenizer=make_tokenizer(), task=spec).tasks[0]
    assert prompts(task, "test") == prompts(Task(data=parity_rows(40), **TEMPLATES), "test")


def test_a_model_is_pruned_for_it_and_its_card_says_so(tmp_path):
    task = Task(data=Dataset.from_list(parity_rows(60)), **{**TEMPLATES, "prompt": ask})
    pruner = SievePruner.from_pretrained(make_model(), tokenizer=make_tokenizer(), task=task)
    pruner.prune(unhealed(pruning_ratio=0.5, rounds=1), progress=False)
    directory = pruner.save_pretrained(tmp_path / "pruned")
    card = (directory / "README.md").read_text()
    assert "`prompt` was the function ask, `data` was 60 rows in memory. The command needs a task with" in card
    assert "`sieve_task.json` does not hold the prompt: " in card
    assert 'pipeline("sieve"' not in card
    (stored,) = json.loads((directory / "sieve_task.json").read_text())["tasks"]
    assert stored.keys() == {"name", "not_stored", "results"}
    assert "# It cannot: a task was made in Python. `prompt` was the function ask, `data` was 60 rows in memory." in (
        (directory / "sieve.yaml").read_text()
    )
    with pytest.raises(
        ValueError, match="`tasks` must be tasks that a file can hold, got one made in Python: `prompt` was"
    ):
        Recipe.from_file(directory / "sieve.yaml").read_tasks(directory)
    with pytest.raises(ValueError, match=r"`task_file` must be given .*, got none: `prompt` was the function ask\."):
        pipeline("sieve", model=str(directory))


def test_a_task_whose_answer_alone_is_a_function_is_applied_to_new_rows(tmp_path):
    task = Task(data=parity_rows(60), **{**TEMPLATES, "answer": lambda row: row["label"]})
    pruner = SievePruner.from_pretrained(make_model(), tokenizer=make_tokenizer(), task=task)
    pruner.prune(unhealed(pruning_ratio=0.5, rounds=1), progress=False)
    directory = pruner.save_pretrained(tmp_path / "pruned")
    assert 'pipeline("sieve"' in (directory / "README.md").read_text()
    assert pipeline("sieve", model=str(directory))("7 51")["prediction"] in ("odd", "even")


def wrong(row: dict[str, Any]) -> Any:
    return {"number": None, "missing": row.get("nothing", {})}["missing"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": 5},
            r"`data` must be a `datasets.Dataset` or `DatasetDict`.*got int for 'data'.*to_dict\(\"records\"\)",
        ),
        (
            {"data": [1, 2]},
            "`data` must have rows that are dictionaries with field names as keys, got 1 as row 1 of 'd",
        ),
        ({"data": [{1: "a"}]}, "field names as keys, got {1: 'a'} as row 1"),
        ({"data": {"train": [], "other": []}}, "`data` must have splits called train, validation and test.*got other"),
        ({"data": []}, "`data` must have rows in every source, got none in data"),
        (
            {"data": IterableDataset.from_generator(lambda: iter(()))},
            "got an IterableDataset for 'data', which may nev",
        ),
        (
            {"data": {"rows": parity_rows(9), "splits": "train"}},
            "`data.splits` must name the sources of the rows, data,",
        ),
        ({"data": {"fils": "rows.jsonl"}}, "`data` must have known keys only, got 'fils'. Did you mean `files`"),
        (
            {"prompt": lambda row: row["txt"]},
            "`prompt` must return a text for every row, got KeyError from .*row 1 of d",
        ),
        ({"prompt": wrong}, "`prompt` must return a text, got {} from wrong for row 1 of data. Return a str."),
        ({"prompt": lambda row: "\ud800"}, "`prompt` must return valid Unicode, got the lone surrogate"),
        ({"answer": lambda row: "neither"}, "`answer` must be one of the labels 'odd', 'even', got 'neither' in row"),
        ({"labels": None}, "`kind` must be given"),
        ({"labls": {}}, "`task` must have known keys only, got 'labls'"),
        ({"stop": print}, "`task.stop` must be a string, number, list or mapping, got builtin_function_or_method"),
    ],
)
def test_errors_name_the_argument(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Task(**{"data": parity_rows(40), **TEMPLATES, **changes})


def test_a_missing_choice_and_a_lone_surrogate_are_named():
    given = {"prompt": lambda row: row["lettered_choices"], "answer": lambda row: 0}
    for texts, message in (
        (["a", None], "`choices` must not hold a missing value, got .'a', None. in row 1"),
        (["a", "\ud800"], "`choices` must return valid Unicode"),
    ):
        with pytest.raises(ValueError, match=message):
            Task(data=[{"x": 1}] * 9, choices=lambda row, texts=texts: texts, **given)


def test_rows_in_a_task_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`data.rows` must be given in Python, got .* in a task file. Name `files`"):
        load_task(tmp_path, data={"rows": [{"text": "1", "label": "odd"}]})
    with pytest.raises(TypeError, match=r"`prompt` must be a string, got \{'function': 'ask'\}"):
        load_task(tmp_path, prompt={"function": "ask"})
