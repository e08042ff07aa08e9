"""`pipeline("sieve")` answers rows as `evaluate` does, with the package's code and with the code beside the weights."""

from __future__ import annotations

import json
import subprocess
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pytest
from model_kinds import make_model as make_kind
from toy import make_model, make_tokenizer, parity_rows, task_spec, unhealed, write_rows
from transformers import AutoModelForSequenceClassification, pipeline

from optimum_sieve import SievePruner, Task, evaluate
from optimum_sieve.evaluation.generation import write_answers
from optimum_sieve.modeling import pipeline_sieve
from optimum_sieve.prediction import SievePipeline


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLASSES = {"package": SievePipeline, "beside the weights": pipeline_sieve.SievePipeline}
CHAT = [{"role": "user", "content": "Number: {{ text }} Parity:"}]
CHOICES = {
    "kind": "choices",
    "labels": None,
    "choices": ["{{ text.split()[-1] }}", "{{ (text.split()[-1] | int + 1) % 100 }}"],
    "answer": "{{ text.split()[-1] }}",
}
# Several tokens, some shared, one the beginning of another; words of the toy tokenizer.
LONG = {"odd": " very odd", "even": " very very even", "neither": " even"}
TASKS: dict[str, dict[str, Any]] = {
    "labels": {},
    "long labels": {"labels": LONG},
    "chat": {"prompt": None, "chat": CHAT},
    "prefilled": {"prompt": None, "chat": [*CHAT, {"role": "assistant", "content": "very"}]},
    "choices": {**CHOICES, "prompt": "Number: {{ choices | join(' ') }} Parity:", "candidate": " {{ choice }}"},
    "normalized": {**CHOICES, "prompt": "Number:{{ text }}?", "candidate": " very {{ choice }}", "normalize": True},
    "written": {"kind": "generate", "labels": None, "max_new_tokens": 4},
    "stopped": {"kind": "generate", "labels": None, "max_new_tokens": 6, "stop": ["3", "7"]},
}


def as_file(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a `sieve_task.json`."""
    return {"format_version": 1, "tasks": [spec]}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl", parity_rows(60))
    return tmp_path


def expected(model: Any, tokenizer: Any, spec: dict[str, Any], root: Path) -> tuple[list[dict[str, str]], list[Any]]:
    """Return rows of a task and the model's answers by `evaluate`: probabilities, or texts."""
    task = Task.from_dict({**spec, "seed": 3}, root)
    examples = task.examples("calibration", tokenizer)
    # Each row's text is in its prompt.
    rows = {row["text"]: row for row in parity_rows(60)}
    found = [max((text for text in rows if f" {text} " in f" {e.prompt} "), key=len) for e in examples]
    if spec["kind"] == "generate":
        texts = [answer.text for answer in write_answers(model, examples, tokenizer, batch_size=16)]
        return [rows[text] for text in found], texts
    result = evaluate(model, examples, tokenizer, metric="accuracy", batch_size=16, progress=False)
    return [rows[text] for text in found], list(np.exp(result.log_probs))


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("choices", "normalized")])
@pytest.mark.parametrize("implementation", CLASSES)
def test_answers_are_those_of_evaluate(name: str, implementation: str, world: Path) -> None:
    tokenizer, model = make_tokenizer(before="<s>", chat=True), make_model()
    spec = task_spec(**TASKS[name])
    if name == "long labels":
        spec["answer"] = "{{ label }}"
    rows, wanted = expected(model, tokenizer, spec, world)
    pipe = CLASSES[implementation](model=model, tokenizer=tokenizer, task="sieve", device=-1, task_file=as_file(spec))
    answers = pipe(rows)
    if spec["kind"] == "generate":
        assert [answer["prediction"] for answer in answers] == wanted
        assert len(set(wanted)) > 1
        return
    labels = list(spec["labels"])
    found = np.array([[answer["probabilities"][label] for label in labels] for answer in answers])
    # The package computes the very same batches.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 if implementation == "package" else 1e-5)
    assert [answer["prediction"] for answer in answers] == [labels[int(p.argmax())] for p in np.array(wanted)]


@pytest.mark.parametrize("name", ["choices", "normalized"])
def test_choices_of_both_implementations_are_equal(name: str) -> None:
    tokenizer, model = make_tokenizer(), make_model()
    rows = [{"text": row["text"]} for row in parity_rows(20)]
    made = [
        kind(model=model, tokenizer=tokenizer, task="sieve", device=-1, task_file=as_file(task_spec(**TASKS[name])))
        for kind in CLASSES.values()
    ]
    first, second = (pipe(rows) for pipe in made)
    for row, one, other in zip(rows, first, second, strict=True):
        last = int(row["text"].split()[-1])
        assert one["prediction"] == str([last, (last + 1) % 100][one["index"]])
        assert (one["prediction"], one["index"]) == (other["prediction"], other["index"])
        np.testing.assert_allclose(one["probabilities"], other["probabilities"], rtol=0, atol=1e-5)
    assert len({answer["index"] for answer in first}) == 2


@pytest.mark.parametrize("kind", ["t5", "bert", "llama-classifier"])
@pytest.mark.parametrize("implementation", CLASSES)
def test_other_kinds_of_models(kind: str, implementation: str, world: Path) -> None:
    tokenizer, model = make_tokenizer(after="</s>"), make_kind(kind)
    spec = task_spec() if kind == "t5" else task_spec(labels={"odd": "odd", "even": "even"})
    rows, wanted = expected(model, tokenizer, spec, world)
    pipe = CLASSES[implementation](model=model, tokenizer=tokenizer, task="sieve", device=-1, task_file=as_file(spec))
    found = np.array([[answer["probabilities"][label] for label in ("odd", "even")] for answer in pipe(rows)])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a pruned model with label offsets."""
    root = tmp_path_factory.mktemp("pruned")
    write_rows(root / "rows.jsonl", parity_rows(60))
    pruner = SievePruner(make_model(), make_tokenizer(), Task.from_dict(task_spec(), root), base_model="toy/base")
    pruner.prune(unhealed(pruning_ratio=0.3, rank_multiple=1, label_offsets="prior"), progress=False)
    return pruner.save_pretrained(root / "pruned")


def test_the_directory_carries_its_task(pruned: Path) -> None:
    content = json.loads((pruned / "sieve_task.json").read_text())
    assert content["format_version"] == 1
    (task,) = content["tasks"]
    assert not {"data", "limit", "group", "seed"} & task.keys()
    assert task["labels"] == {"odd": " odd", "even": " even"}
    report = json.loads((pruned / "sieve_report.json").read_text())
    assert task["results"]["pruned"] == report["pruned"]
    assert str(pruned.parent) not in json.dumps(content)


def test_pipeline_by_name_adds_label_offsets(pruned: Path) -> None:
    pipe = pipeline("sieve", model=str(pruned), device=-1)
    assert type(pipe) is SievePipeline
    offsets = pipe.model.config.sieve["label_offsets"][0]["offsets"]
    assert offsets[0] != offsets[1]
    answer = pipe("7 51 30")
    plain = SievePipeline(
        model=make_model(), tokenizer=make_tokenizer(), task="sieve", device=-1, task_file=as_file(task_spec())
    )
    plain.model = pipe.model
    plain.model.config.sieve = {**plain.model.config.sieve, "label_offsets": []}
    without = plain("7 51 30")["probabilities"]
    ratio = np.log(answer["probabilities"]["odd"] / answer["probabilities"]["even"])
    assert ratio == pytest.approx(np.log(without["odd"] / without["even"]) + offsets[0] - offsets[1], abs=1e-9)


def test_all_kinds_of_inputs(pruned: Path) -> None:
    pipe = pipeline("sieve", model=str(pruned), device=-1, batch_size=4)
    texts = [row["text"] for row in parity_rows(150)]
    wanted = pipe(texts)
    assert pipe(texts[0]) == pipe({"text": texts[0], "other": None})
    assert pipe([]) == []

    def same(answers: Any) -> bool:
        return [answer["prediction"] for answer in answers] == [answer["prediction"] for answer in wanted]

    rows = [{"text": text} for text in texts]
    assert same(pipe(rows))
    streamed = pipe(datasets.Dataset.from_list(rows))
    assert not isinstance(streamed, list)
    assert same(streamed)
    assert same(pipe(row for row in rows))
    assert same(pipe(texts, batch_size=32))


def test_a_stream_reads_no_further_than_it_answers(pruned: Path) -> None:
    read = []

    def rows() -> Iterator[str]:
        for row in parity_rows(200):
            read.append(row)
            yield row["text"]

    answers = pipeline("sieve", model=str(pruned), device=-1, batch_size=2)(rows())
    assert not read
    next(answers)
    assert 0 < len(read) < 100


@pytest.mark.parametrize("implementation", CLASSES)
def test_rows_that_do_not_fit_are_named(implementation: str) -> None:
    pipe = CLASSES[implementation](
        model=make_model(), tokenizer=make_tokenizer(), task="sieve", device=-1, task_file=as_file(task_spec())
    )
    with pytest.raises(ValueError, match=r"text(.|\n)*2|2(.|\n)*text"):
        pipe([{"text": "1"}, {"number": "2"}])
    with pytest.raises(ValueError, match="missing"):
        pipe([{"text": None}])
    with pytest.raises(TypeError, match="row 1"):
        pipe([3])
    with pytest.raises(TypeError, match="top_k"):
        pipe("1", top_k=2)


def test_several_tasks_are_chosen_by_name() -> None:
    specs = [task_spec(), task_spec(name="other", labels={"a": " odd", "b": " even"})]
    given: dict[str, Any] = {"model": make_model(), "tokenizer": make_tokenizer(), "task": "sieve", "device": -1}
    given["task_file"] = {"format_version": 1, "tasks": specs}
    assert SievePipeline(**given, task_name="other")("7")["prediction"] in ("a", "b")
    for name in (None, "third"):
        with pytest.raises(ValueError, match=r"`task_name` must be one of 'parity', 'other'"):
            SievePipeline(**given, task_name=name)


def test_a_task_file_serves_the_dense_model(tmp_path: Path) -> None:
    # Its data is not read.
    (tmp_path / "task.json").write_text(json.dumps(task_spec(data={"files": "missing.jsonl"})))
    make_model().save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    pipe = pipeline("sieve", model=str(tmp_path / "dense"), device=-1, task_file=tmp_path / "task.json")
    assert pipe("7")["prediction"] in ("odd", "even")
    with pytest.raises(ValueError, match=r"`task_file` must be given for a model without sieve_task\.json"):
        pipeline("sieve", model=str(tmp_path / "dense"), device=-1)


def test_newer_files_and_lost_heads_are_refused(tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": make_model(), "tokenizer": make_tokenizer(), "task": "sieve", "device": -1}
    with pytest.raises(ValueError, match="pip install --upgrade optimum-sieve"):
        SievePipeline(**given, task_file={"format_version": 2, "tasks": [task_spec()]})
    make_kind("llama-classifier").save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    spec = as_file(task_spec(labels={"odd": "odd", "even": "even"}))
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification"):
        pipeline("sieve", model=str(tmp_path / "dense"), device=-1, task_file=spec)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert pipeline("sieve", model=model, tokenizer=make_tokenizer(), device=-1, task_file=spec)("7")["prediction"]


@pytest.mark.parametrize("implementation", CLASSES)
@pytest.mark.parametrize("choices", [["1"], [str(n) for n in range(27)], ["1", None, "2"], ["1", "1"]])
def test_choices_that_cannot_be_told_apart_are_refused(implementation: str, choices: list[Any]) -> None:
    spec = task_spec(**{**CHOICES, "choices": "{{ texts }}", "candidate": " {{ choice }}"})
    given: dict[str, Any] = {"model": make_model(), "tokenizer": make_tokenizer(), "task": "sieve", "device": -1}
    pipe = CLASSES[implementation](**given, task_file=as_file(spec))
    with pytest.raises(ValueError, match=r"choices|missing"):
        pipe({"text": "1", "texts": choices})


def test_a_key_that_no_task_has_is_named() -> None:
    given: dict[str, Any] = {"model": make_model(), "tokenizer": make_tokenizer(), "task": "sieve", "device": -1}
    with pytest.raises(ValueError, match=r"got 'answr'\. Did you mean `answer`"):
        SievePipeline(**given, task_file={**task_spec(), "answr": "{{ label }}"})


def test_a_dense_model_in_a_new_process(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(json.dumps(task_spec()))
    make_model().save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    code = (
        "import optimum_sieve.prediction.pipeline\nfrom transformers import pipeline\n"
        "print(pipeline('sieve', model='dense', device=-1, task_file='task.json')('7')['prediction'])\n"
    )
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.strip() in ("odd", "even")


@pytest.mark.parametrize("wrong", [5, None])
def test_what_is_no_row_is_refused_at_once(pruned: Path, wrong: Any) -> None:
    with pytest.raises(TypeError, match="`inputs` must be rows"):
        pipeline("sieve", model=str(pruned), device=-1)(wrong)


def test_any_mapping_is_a_row(pruned: Path) -> None:
    pipe = pipeline("sieve", model=str(pruned), device=-1)
    wanted = pipe("7 51 30")
    assert pipe(MappingProxyType({"text": "7 51 30"})) == wanted
    rows = datasets.Dataset.from_list([{"text": "7 51 30"}])
    assert rows.map(lambda row: {"found": pipe(row)["prediction"]})["found"] == [wanted["prediction"]]


@pytest.mark.parametrize(
    "content", [[], "x", None, {"format_version": 1, "tasks": [1]}, {"format_version": 1, "tasks": []}]
)
def test_damaged_task_files_are_named(content: Any, tmp_path: Path) -> None:
    (tmp_path / "sieve_task.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="`task_file` must hold a list of `tasks`"):
        pipeline_sieve.read_tasks(None, tmp_path / "sieve_task.json")
    (tmp_path / "sieve_task.json").write_text("{")
    with pytest.raises(ValueError, match=r"got an error in .*sieve_task\.json"):
        pipeline_sieve.read_tasks(None, tmp_path / "sieve_task.json")
