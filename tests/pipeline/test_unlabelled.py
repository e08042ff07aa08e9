"""Rows without answers: they count for moments and healing, and for nothing else."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from healed_world import TOKENIZER, learn
from toy import load_task, parity_rows, prompts, unhealed, write_rows
from written_world import WRITTEN

from optimum_sieve import HealConfig, SievePruner, TuneConfig
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.healing.lessons import make_lessons
from optimum_sieve.pipeline.heal import heal_pruned
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.tuning.loop import train


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Task

ROWS = parity_rows(260)
QUIET: dict[str, Any] = {"progress": False}


def write_data(directory: Path, extra: list[dict[str, Any]], **changes: Any) -> Task:
    """Write a task of 60 labelled rows and others without answers."""
    write_rows(directory / "extra.jsonl", extra)
    splits = {"calibration": ROWS[:60], "selection": ROWS[60:120], "test": ROWS[120:180]}
    for split, rows in splits.items():
        write_rows(directory / f"{split}.jsonl", rows)
    files = {split: f"{split}.jsonl" for split in splits} | ({"unlabelled": "extra.jsonl"} if extra else {})
    return load_task(directory, data={"files": files}, **changes)


def without_labels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"text": row["text"]} for row in rows]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return write_data(tmp_path, without_labels(ROWS[180:220]))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return learn(write_data(tmp_path_factory.mktemp("dense"), []))


def make_run(model: PreTrainedModel, task: Task, work_dir: Path | None = None, **settings: Any) -> Run:
    config = unhealed(**{"pruning_ratio": 0.5, "rounds": 1, **settings})
    return prepare(model, TOKENIZER, [task], config, work_dir=work_dir, study_storage=None, progress=False)


def test_they_have_no_answers(task: Task) -> None:
    assert task.splits == {"calibration": 60, "selection": 60, "test": 60, "unlabelled": 40}
    examples = task.examples("unlabelled", TOKENIZER)
    assert {example.target for example in examples} == {None}
    assert {example.candidates for example in examples} == {(" odd", " even")}
    assert {example.answer for example in task.examples("calibration", TOKENIZER)} == {" odd", " even"}


def test_shared_sources_need_fractions(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    files = dict.fromkeys(("calibration", "selection", "test", "unlabelled"), "rows.jsonl")
    with pytest.raises(ValueError, match=r"`data\.fractions` must be given where `unlabelled` shares a source"):
        load_task(tmp_path, data={"files": files})


def test_they_are_limited_and_may_share_a_source(tmp_path: Path) -> None:
    assert write_data(tmp_path, without_labels(ROWS[180:]), limit={"unlabelled": 7}).splits["unlabelled"] == 7
    names = ("calibration", "selection", "test", "unlabelled")
    data = {"files": dict.fromkeys(names, "rows.jsonl"), "fractions": dict.fromkeys(names, 1)}
    shared = load_task(tmp_path, ROWS[:80], data=data)
    assert shared.splits == dict.fromkeys(names, 20)
    assert len({prompt for name in names for prompt in prompts(shared, name)}) == 80


@pytest.mark.parametrize("start", [0, 60, 120])
def test_rows_of_another_split_are_refused(tmp_path: Path, start: int) -> None:
    with pytest.raises(ValueError, match="must have disjoint splits, got 5 rows of unlabelled whose prompt is in"):
        write_data(tmp_path, without_labels(ROWS[start : start + 5]))


def test_moments_are_those_of_labelled_rows(task: Task, dense: PreTrainedModel, tmp_path: Path) -> None:
    """Moments over candidates need no answers, so the rows count as if they were calibration rows."""
    found = calibrate(make_run(copy.deepcopy(dense), task))
    (tmp_path / "more").mkdir()
    more = write_data(tmp_path / "more", [])
    write_rows(tmp_path / "more" / "calibration.jsonl", [*ROWS[:60], *ROWS[180:220]])
    more = load_task(tmp_path / "more", data=more.spec["data"])
    expected = calibrate(make_run(copy.deepcopy(dense), more))
    alone = calibrate(make_run(copy.deepcopy(dense), write_data(tmp_path / "more", [])))
    for name, basis in found.items():
        torch.testing.assert_close(basis.energy, expected[name].energy, rtol=1e-3, atol=1e-9)
    assert any(not torch.allclose(basis.energy, alone[name].energy, rtol=1e-2) for name, basis in found.items())


def test_stored_moments_depend_on_them(task: Task, dense: PreTrainedModel, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = calibrate(make_run(copy.deepcopy(dense), task, work)).key
    assert calibrate(make_run(copy.deepcopy(dense), task, work)).key == first
    others = [write_data(tmp_path, rows) for rows in (without_labels(ROWS[180:221]), [])]
    keys = {calibrate(make_run(copy.deepcopy(dense), other, work)).key for other in others}
    assert len(keys | {first}) == 3


@pytest.mark.parametrize("loss", ["candidates", "vocabulary"])
def test_they_are_healed_by_the_model_alone(task: Task, dense: PreTrainedModel, loss: str) -> None:
    run = make_run(copy.deepcopy(dense), task, heal=HealConfig(steps=1, loss=loss, crossed_prompts=0))
    labelled, unlabelled = make_lessons(run)
    assert (len(labelled.examples), labelled.gold, labelled.weight) == (60, True, pytest.approx(0.6))
    assert (len(unlabelled.examples), unlabelled.gold, unlabelled.weight) == (40, False, pytest.approx(0.4))
    # Next tokens are matched along an answer, which is then the model's own.
    assert all(example.answer for example in unlabelled.examples) == (loss == "vocabulary")


def test_a_run_uses_them_and_tunes_on_answers_alone(task: Task, dense: PreTrainedModel, tmp_path: Path) -> None:
    pruner = SievePruner(copy.deepcopy(dense), TOKENIZER, task)
    config = unhealed(pruning_ratio=0.5, rank_multiple=1, rounds=1, heal=HealConfig(steps=1), tune=TuneConfig(steps=1))
    assert "calibration 60, selection 60, test 60, unlabelled 40" in pruner.plan(config).format()
    report = pruner.prune(config, **QUIET).report
    assert report["healing"]["examples"] == 100
    _, training, _ = train(make_run(copy.deepcopy(dense), task, heal=HealConfig(steps=1), tune=TuneConfig(steps=1)))
    assert training.examples == 60
    plain = SievePruner(copy.deepcopy(dense), TOKENIZER, task)
    plain.prune(unhealed(pruning_ratio=0.5, rank_multiple=1, rounds=1), **QUIET)
    plain.save_pretrained(tmp_path / "pruned")
    dense.save_pretrained(tmp_path / "dense")
    TOKENIZER.save_pretrained(tmp_path / "dense")
    healed, _ = heal_pruned(tmp_path / "pruned", tmp_path / "dense", [task], HealConfig(steps=1), **QUIET)
    assert healed.report["healing"]["examples"] == 100


def test_the_model_writes_the_answers_of_written_tasks(dense: PreTrainedModel, tmp_path: Path) -> None:
    task = write_data(tmp_path, without_labels(ROWS[180:190]), **WRITTEN)
    run = make_run(copy.deepcopy(dense), task, heal=HealConfig(steps=1), rounds=1)
    assert {example.accepted for example in run.tasks[0].unlabelled} == {()}
    bases = calibrate(run)
    _, unlabelled = make_lessons(run)
    assert bases
    assert all(len(example.accepted) == 1 for example in unlabelled.examples)
