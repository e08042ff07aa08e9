"""Tasks whose metric is a module of the evaluate library: read, pruned for, searched for and reported."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from healed_world import TOKENIZER, learn
from huggingface_hub import ModelCard
from metric_modules import ACCURACY, F1, LISTS, TEXTS, write_module
from sklearn.metrics import f1_score
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed, write_task
from transformers import pipeline
from written_world import ANSWER, WRITTEN

from optimum_sieve import Evaluation, SievePruner, Task, compare, evaluate
from optimum_sieve.evaluation import stage
from optimum_sieve.evaluation.stage import compare_pruned, score
from optimum_sieve.metrics import ModuleMetric
from optimum_sieve.metrics.identity import metric_source
from optimum_sieve.tasks.several import read_tasks


if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

QUIET: dict[str, Any] = {"progress": False}
F1_SPEC = {"evaluate": "./f1.py", "args": {}}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("task")
    write_module(directory, "f1", F1)
    write_module(directory, "accuracy", ACCURACY)
    return directory


@pytest.fixture(scope="module")
def task(directory: Path) -> Task:
    fractions = {"calibration": 0.2, "selection": 0.6, "test": 0.2}
    return load_task(directory, parity_rows(800), data={"files": "rows.jsonl", "fractions": fractions}, metric=F1_SPEC)


@pytest.fixture(scope="module")
def learned(task: Task) -> PreTrainedModel:
    return learn(task)


@pytest.fixture
def dense(learned: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(learned)


def test_a_task_is_scored_by_the_module(task: Task, dense: PreTrainedModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 32, "progress": False}
    found = evaluate(dense, task.examples("test", TOKENIZER), TOKENIZER, metric=task.metric, **options)
    assert (found.metric, found.error_method) == ("f1", "jackknife")
    assert found.score == pytest.approx(f1_score(found.targets, found.predictions))
    found.save(tmp_path / "evaluation.safetensors")
    loaded = Evaluation.load(tmp_path / "evaluation.safetensors")
    assert (loaded.error_method, loaded.module) == (found.error_method, found.module)
    assert loaded.module is not None
    assert loaded.module["evaluate"] == "f1"
    np.testing.assert_array_equal(loaded.values, found.values)
    assert compare(found, loaded).standard_error == 0


def test_reading_a_task_runs_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    write_module(tmp_path, "accuracy", ACCURACY, imports=f"open({str(marker)!r}, 'w').close()")
    path = write_task(tmp_path, metric={"evaluate": "./accuracy.py"})
    task, untrusted = Task.from_file(path), Task.from_file(path, trust_remote_code=False)
    examples = untrusted.examples("test", make_tokenizer())
    with pytest.raises(ValueError, match=r"`metric` must not be code that came with a model"):
        evaluate(make_model(), examples, make_tokenizer(), metric=untrusted.metric, batch_size=8)
    assert not marker.exists()
    evaluate(make_model(), examples, make_tokenizer(), metric=task.metric, batch_size=8, progress=False)
    assert marker.exists()


def test_a_module_that_the_users_task_file_names_is_run(tmp_path: Path, cli: Callable[..., Any]) -> None:
    write_module(tmp_path, "accuracy", ACCURACY)
    path = write_task(tmp_path, metric={"evaluate": "./accuracy.py"})
    assert read_tasks(path)[0].metric.source == Task.from_file(path).metric.source
    make_model().save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    status, out, err = cli("evaluate", "--model", tmp_path / "dense", "--task", path)
    assert status == 0, err
    assert "accuracy" in out
    assert cli("tasks", "check", path)[0] == 0
    path = write_task(tmp_path, metric={"evaluate": "./missing.py"})
    assert "missing.py" in "".join(cli("tasks", "check", path)[1:])


def test_the_code_is_part_of_a_tasks_identity(tmp_path: Path) -> None:
    def read(body: str) -> Task:
        write_module(tmp_path, "f1", body)
        return load_task(tmp_path, metric=F1_SPEC)

    first, same, other = read(F1), read(F1), read(F1.replace("0.5", "0.25"))
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
    assert metric_source(first.metric) == metric_source(same.metric) != metric_source(other.metric)


def test_in_python_a_module_replaces_the_metric_of_the_file(directory: Path, tmp_path: Path) -> None:
    path = write_task(tmp_path, metric="macro_f1")
    metric = ModuleMetric(module=str(directory / "accuracy.py"), key="accuracy")
    task = Task.from_file(path, metric=metric)
    assert task.metric is metric
    assert "metric" not in task.spec
    examples = task.examples("test", make_tokenizer())
    options: dict[str, Any] = {"batch_size": 8, "progress": False}
    found = evaluate(make_model(), examples, make_tokenizer(), metric=task.metric, **options)
    assert found.score == evaluate(make_model(), examples, make_tokenizer(), metric="accuracy", **options).score


def test_a_pruned_models_own_task_answers_without_its_metric(tmp_path: Path) -> None:
    path = write_task(tmp_path, metric={"evaluate": str(tmp_path / "accuracy.py"), "greater_is_better": True})
    write_module(tmp_path, "accuracy", ACCURACY)
    pruner = SievePruner(make_model(), make_tokenizer(), Task.from_file(path))
    pruner.prune(unhealed(pruning_ratio=0.3, rank_multiple=1, rounds=1), **QUIET)
    directory = pruner.save_pretrained(tmp_path / "pruned")
    # Anybody may have written this module.
    marker = tmp_path / "ran"
    write_module(directory, "accuracy", ACCURACY, imports=f"open({str(marker)!r}, 'w').close()")
    (stored,) = json.loads((directory / "sieve_task.json").read_text())["tasks"]
    assert stored["metric"] == {"evaluate": "./accuracy.py", "greater_is_better": True}
    assert stored["results"]["error_method"] == "examples"
    answers = pipeline("sieve", model=str(directory), device=-1)(["7 51 30"])
    assert set(answers[0]["probabilities"]) == {"odd", "even"}
    assert not marker.exists()


def test_a_recipe_runs_a_module_only_if_it_is_trusted(tmp_path: Path, cli: Callable[..., Any]) -> None:
    marker = tmp_path / "ran"
    write_module(tmp_path, "accuracy", ACCURACY, imports=f"open({str(marker)!r}, 'w').close()")
    write_task(tmp_path, metric={"evaluate": "./accuracy.py"})
    spec = json.loads((tmp_path / "task.json").read_text())
    make_model().save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    settings = {"pruning_ratio": 0.3, "rank_multiple": 1, "rounds": 1, "heal": None, "tune": None}
    for name, task in (("whole", spec), ("named", "task.json")):
        recipe = {"model": str(tmp_path / "dense"), "tasks": [task], "settings": settings}
        (tmp_path / f"{name}.json").write_text(json.dumps(recipe))
        words = ("run", tmp_path / f"{name}.json", "--device", "cpu", "--output", tmp_path / name)
        status, _, errors = cli(*words)
        assert status != 0
        assert "`metric` must not be code that came with a model" in errors
        assert not marker.exists()
    status, _, errors = cli(*words, "--trust-remote-code")
    assert status == 0, errors
    assert marker.exists()


@pytest.mark.parametrize(
    ("metric", "kind", "message"),
    [
        ({"evaluate": "./none.py"}, FileNotFoundError, r"`metric.evaluate` must be a Hub id, a `.py` file"),
        ({"key": "f1"}, ValueError, r"`metric.evaluate` must be given"),
        (
            ["f1"],
            ValueError,
            r"`metric` must be one of accuracy, macro_f1, got \['f1'\]. .* `metric: \{evaluate: name\}`",
        ),
    ],
)
def test_a_task_file_with_another_metric_is_refused(tmp_path: Path, metric: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        load_task(tmp_path, metric=metric)


def test_a_module_that_does_not_fit_is_found_before_any_work(tmp_path: Path) -> None:
    write_module(tmp_path, "f1", F1, features=TEXTS)
    task = load_task(tmp_path, metric=F1_SPEC)
    pruner = SievePruner(make_model(), make_tokenizer(), task)
    with pytest.raises(ValueError, match=r"`metric.evaluate` must name a module whose .* are classes as numbers"):
        pruner.prune(unhealed(pruning_ratio=0.5), **QUIET)


def test_a_run_within_a_tolerance_ends_in_a_report_and_a_card(
    directory: Path, task: Task, dense: PreTrainedModel, cli: Callable[..., Any], tmp_path: Path
) -> None:
    dense.save_pretrained(tmp_path / "dense")
    TOKENIZER.save_pretrained(tmp_path / "dense")
    pruner = SievePruner.from_pretrained(tmp_path / "dense", task=task, device="cpu")
    config = unhealed(tolerance=0.05, rank_multiple=1, rounds=1, search_steps=4)
    result = pruner.prune(config, work_dir=tmp_path / "work", **QUIET)
    pruner.save_pretrained(tmp_path / "pruned")

    report = json.loads((tmp_path / "pruned" / "sieve_report.json").read_text())
    assert (report["metric"], report["error_method"]) == ("f1", "jackknife")
    assert report["metric_module"]["evaluate"] == "f1"
    assert len(report["metric_module"]["sha256"]) == 64
    assert str(directory) not in json.dumps(report)
    found = result.scores[0].pruned
    assert report["pruned"]["score"] == pytest.approx(f1_score(found.targets, found.predictions))
    assert report["parameters"]["targets_after"] < report["parameters"]["targets_before"]
    text = (tmp_path / "pruned" / "README.md").read_text()
    assert "no mean over examples: standard errors are those of the jackknife" in text
    results = ModelCard(text).data.eval_results
    assert {(each.metric_type, each.metric_name) for each in results} == {
        ("f1", "f1 (pruned model)"),
        ("f1", "f1 (dense model)"),
    }

    words = ("--task", directory / "task.json", "--device", "cpu", "--json", tmp_path / "again.json")
    status, output, errors = cli("evaluate", "--model", tmp_path / "pruned", "--compare-to", tmp_path / "dense", *words)
    assert status == 0, errors
    assert "errors by jackknife" in output
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["pruned"] == report["pruned"]
    assert again["paired_difference"] == pytest.approx(report["paired_difference"])


def test_the_genetic_search_scores_candidates_by_the_module(task: Task, dense: PreTrainedModel, tmp_path: Path) -> None:
    pruner = SievePruner(dense, TOKENIZER, task)
    search: dict[str, Any] = {"allocation": "genetic", "population_size": 4, "generations": 2, "rounds": 1}
    result = pruner.prune(unhealed(tolerance=0.3, confidence=0.5, rank_multiple=2, **search), **QUIET)
    summary = result.report["settings"]
    assert summary["allocation"] == "genetic"
    assert result.report["metric"] == "f1"
    parameters = result.report["parameters"]
    assert parameters["targets_after"] < parameters["targets_before"]


@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_only_a_mean_gets_a_first_look(
    task: Task, dense: PreTrainedModel, directory: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = load_task(directory, parity_rows(800), data=task.spec["data"], metric={"evaluate": f"./{name}.py"})
    run = SievePruner(dense, TOKENIZER, read)._prepare(
        unhealed(tolerance=0.02), work_dir=tmp_path / "work", study_storage=None, progress=False
    )
    looks: list[int] = []
    monkeypatch.setattr(stage, "is_settled", lambda *arguments, **options: looks.append(arguments[2]) or True)
    reference = score(run, run.tasks[0], "selection", label="dense model")
    count = compare_pruned(run, run.tasks[0], reference, label="pruned", pruned="x").count
    selection = len(run.tasks[0].selection)
    assert selection >= 400
    assert (count, looks) == ((selection // 4, [selection // 4]) if name == "accuracy" else (selection, []))
    # Stored under the module's source: another metric is scored again.
    changed = replace(run.tasks[0], metric=replace(run.tasks[0].metric, key="hits", scale=0.001))
    if name == "f1":
        assert score(run, changed, "selection", label="dense model").metric == "f1/hits (scale=0.001)"


def test_written_answers_are_scored_by_all_accepted_ones(tmp_path: Path) -> None:
    body = "return {'match': np.mean([text in each for text, each in zip(predictions, gold)])}"
    write_module(tmp_path, "match", body, features=LISTS)
    task = load_task(tmp_path, parity_rows(80), **{**WRITTEN, **ANSWER, "metric": {"evaluate": "./match.py"}})
    examples = task.examples("selection", make_tokenizer())
    model = make_model()
    options: dict[str, Any] = {"batch_size": 8, "progress": False}
    written = evaluate(model, examples, make_tokenizer(), metric="exact_match", **options).texts
    examples = [replace(example, accepted=("x", text)) for example, text in zip(examples, written, strict=True)]
    found = evaluate(model, examples, make_tokenizer(), metric=task.metric, **options)
    assert (found.score, found.metric, found.error_method) == (1.0, "match", "examples")
    search: dict[str, Any] = {"allocation": "genetic", "population_size": 4, "generations": 1, "rounds": 1}
    config = unhealed(tolerance=0.9, confidence=0.5, rank_multiple=2, **search)
    report = SievePruner(model, make_tokenizer(), task).prune(config, **QUIET).report
    assert (report["metric"], report["metric_module"]["evaluate"]) == ("match", "match")
