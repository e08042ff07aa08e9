"""A quarter of many selection examples decides about a size that is clearly within the tolerance or beyond it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from healed_world import TOKENIZER, learn
from toy import load_task, parity_rows, unhealed

from optimum_sieve import SievePruner, compare
from optimum_sieve.evaluation import stage
from optimum_sieve.evaluation.scores import evaluation_of
from optimum_sieve.evaluation.stage import compare_pruned, compare_tuned, score, score_test_pruned


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Task

FRACTIONS = {"calibration": 0.1, "selection": 0.8, "test": 0.1}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    directory = tmp_path_factory.mktemp("task")
    return load_task(directory, parity_rows(600), data={"files": "rows.jsonl", "fractions": FRACTIONS})


@pytest.fixture(scope="module")
def dense(task: Task) -> PreTrainedModel:
    return learn(task)


@pytest.fixture
def run(dense: PreTrainedModel, task: Task, tmp_path: Path) -> Run:
    pruner = SievePruner(dense, TOKENIZER, task)
    config = unhealed(tolerance=0.02, label_offsets="prior")
    return pruner._prepare(config, work_dir=tmp_path / "work", study_storage=None, progress=False)


def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the number of examples of each evaluation from now on."""
    scored: list[int] = []
    evaluate = stage.evaluate

    def counting(model: Any, examples: Any, *arguments: Any, **options: Any) -> Any:
        scored.append(len(examples))
        return evaluate(model, examples, *arguments, **options)

    monkeypatch.setattr(stage, "evaluate", counting)
    return scored


@pytest.mark.parametrize("settled", [True, False])
def test_the_first_quarter_is_scored_once(run: Run, settled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = run.tasks
    reference = score(run, task, "selection", label="dense model")
    scored = counts(monkeypatch)
    monkeypatch.setattr(stage, "is_settled", lambda *arguments, **options: settled)
    found = compare_pruned(run, task, reference, label="pruned model", pruned="some hash")
    count = len(task.selection)
    assert count >= 400
    assert scored == ([count // 4] if settled else [count // 4, count - count // 4])
    assert found.count == sum(scored)


def test_offsets_need_only_the_rest_of_a_split_whose_first_quarter_decided(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = run.tasks
    reference = score(run, task, "selection", label="dense model")
    monkeypatch.setattr(stage, "is_settled", lambda *arguments, **options: True)
    compare_pruned(run, task, reference, label="pruned model", pruned="some hash")
    scored = counts(monkeypatch)
    _, offsets = score_test_pruned(run, "some hash")
    count = len(task.selection)
    assert scored == [count - count // 4, len(task.test)]
    assert score_test_pruned(run)[1][0]["offsets"] == pytest.approx(offsets[0]["offsets"], abs=1e-5)
    assert scored[2:] == [count, len(task.test)]


def test_both_parts_give_the_evaluation_of_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = run.tasks
    monkeypatch.setattr(stage, "is_settled", lambda *arguments, **options: False)
    reference = score(run, task, "selection", label="dense model")
    options: dict[str, Any] = {"label": "pruned model", "pruned": "some hash"}
    compare_pruned(run, task, reference, **options)
    # Stored as the evaluation of the whole split.
    joined = score(run, task, "selection", **options)
    assert compare(reference, joined).agreement == 1
    assert joined.count == reference.count
    np.testing.assert_allclose(joined.log_probs, reference.log_probs, atol=1e-5)
    np.testing.assert_array_equal(joined.values, reference.values)


def test_classes_that_weigh_alike_are_scored_on_all_examples(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "is_settled", lambda *arguments, **options: pytest.fail("a first look"))
    task = replace(run.tasks[0], metric="macro_f1")
    reference = score(run, task, "selection", label="dense model")
    assert compare_pruned(run, task, reference, label="pruned", pruned="x").count == len(task.selection)


@pytest.mark.parametrize("settled", [True, False])
def test_other_examples_may_have_more_candidates(run: Run, settled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = run.tasks
    first = list(task.selection)
    first[-1] = replace(first[-1], candidates=(*first[-1].candidates, " neither"))
    task = replace(task, selection=first)
    monkeypatch.setattr(stage, "is_settled", lambda *arguments, **options: settled)
    reference = score(run, task, "selection", label="dense model")
    assert reference.log_probs.shape[1] == 3
    found = compare_pruned(run, task, reference, label="pruned", pruned="x")
    assert found.count == (len(first) // 4 if settled else len(first))
    assert (found.mean, found.agreement) == (0, 1)
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_few_examples_are_scored_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (task,) = run.tasks
    monkeypatch.setattr(stage, "LEAST_LOOK", 200)
    monkeypatch.setattr(stage, "is_settled", lambda *arguments, **options: pytest.fail("a first look"))
    reference = score(run, task, "selection", label="dense model")
    assert compare_pruned(run, task, reference, label="pruned", pruned="x").count == len(task.selection)


@pytest.mark.parametrize(("before", "decides"), [("wrong", True), ("right", True), ("the same", False)])
def test_a_quarter_tells_that_tuning_helped_or_hurt(run: Run, before: str, decides: bool) -> None:
    (task,) = run.tasks
    tuned = score(run, task, "selection", label="dense model")
    targets = np.array([example.target for example in task.selection])
    sure = np.where(np.arange(2) == targets[:, None], 0.0, -9.0)
    scores = {"wrong": -9 - sure, "right": sure, "the same": tuned.log_probs}[before]
    first, after = compare_tuned(run, task, evaluation_of(scores, task.selection, task.metric))
    count = len(task.selection)
    assert first.count == after.count == (count // 4 if decides else count)
    expected = {"wrong": tuned.score, "right": tuned.score - 1, "the same": 0.0}[before]
    assert compare(first, after).mean == pytest.approx(expected, abs=0.1)
