"""Healing a saved model goes through the stages of a run, with one model in memory at a time."""

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed

from optimum_sieve import HealConfig, SievePruner
from optimum_sieve.backbone import fingerprint
from optimum_sieve.backbone.loading import load_model
from optimum_sieve.calibration import writing
from optimum_sieve.evaluation import stage as evaluation_stage
from optimum_sieve.evaluation.scores import evaluate
from optimum_sieve.modeling.fingerprint import weights_digest
from optimum_sieve.pipeline import heal as heal_module
from optimum_sieve.pipeline.heal import heal_pruned
from optimum_sieve.training.optimizer import ParameterTraining


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve.publish.result import SieveResult
    from optimum_sieve.tasks import Task

HEAL = HealConfig(steps=4, learning_rate=1e-2)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return load_task(tmp_path, parity_rows(90))


@pytest.fixture
def saved(tmp_path: Path, task: Task) -> Path:
    """A directory with a dense model and one pruned from it."""
    make_model().save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    pruner = SievePruner.from_pretrained(tmp_path / "dense", task=task, device="cpu")
    pruner.prune(unhealed(pruning_ratio=0.6, rank_multiple=1, rounds=1), progress=False)
    return pruner.save_pretrained(tmp_path / "pruned").parent


def heal(saved: Path, task: Task, **options: Any) -> SieveResult:
    where = {"model": saved / "pruned", "dense": saved / "dense", "device": "cpu", "progress": False}
    return heal_pruned(tasks=[task], config=HEAL, **{**where, **options})[0]


def test_the_dense_model_is_freed_before_the_pruned_one_is_loaded(
    saved: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []

    def loading(*args: Any, **options: Any) -> Any:
        gc.collect()
        assert [reference() for reference in alive] == [None] * len(alive)
        loaded = load_model(*args, **options)
        alive.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(heal_module, "load_model", loading)
    heal(saved, task)
    assert len(alive) == 2


def test_a_run_that_goes_on_repeats_nothing_of_the_dense_model(
    saved: Path, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = heal(saved, task, work_dir=tmp_path / "work")
    assert first.report["seconds"]["healing"] > 0
    scored = []
    monkeypatch.setattr(
        evaluation_stage,
        "evaluate",
        lambda *args, description, **options: scored.append(description) or evaluate(*args, **options),
    )
    monkeypatch.setattr(ParameterTraining, "step", None)
    again = heal(saved, task, work_dir=tmp_path / "work")
    assert scored == ["pruned model on test"]
    for part in ("pruned", "kl", "healing"):
        assert again.report[part] == first.report[part]


@pytest.mark.parametrize(("stored", "count"), [(True, 2), (False, 1)])
def test_the_pruned_model_is_hashed_once_for_its_check_and_once_for_the_work_directory(
    saved: Path, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool, count: int
) -> None:
    hashed = []

    def hashing(model: Any, **options: Any) -> str:
        hashed.append(model.config.model_type)
        return weights_digest(model, **options)

    monkeypatch.setattr(fingerprint, "weights_digest", hashing)
    heal(saved, task, work_dir=tmp_path / "work" if stored else None)
    assert Counter(hashed) == Counter({"llama": int(stored), "sieve": count})


def test_a_dense_model_at_fault_is_named(saved: Path, task: Task) -> None:
    with pytest.raises(ValueError, match="`dense` must be a dense model, got one that is pruned already"):
        heal(saved, task, dense=saved / "pruned")
    damaged: Any = make_model()
    with torch.no_grad():
        damaged.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    damaged.save_pretrained(saved / "dense")
    with pytest.raises(ValueError, match=r"`dense` must have finite weights, got NaN or infinity in `model\.layers\.1"):
        heal(saved, task)


@pytest.mark.parametrize(("settings", "count"), [({}, 0), ({"written_prompts": 0}, 0), ({"written_prompts": 3}, 3)])
def test_prompts_are_written_as_while_it_was_pruned(
    saved: Path, task: Task, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], count: int
) -> None:
    path = saved / "pruned" / "config.json"
    config = json.loads(path.read_text())
    # Earlier versions had no such setting.
    config["sieve"]["settings"].pop("written_prompts", None)
    config["sieve"]["settings"] |= settings
    path.write_text(json.dumps(config))
    monkeypatch.setattr(writing, "write_prompts", lambda model, own, tokenizer, n, **options: ["1 2 3", "4", "5"][:n])
    monkeypatch.setattr(writing, "FEW_PROMPTS", 200)
    report = heal(saved, task).report
    assert report.get("written_prompts", 0) == count
    assert report["healing"]["examples"] == len(task.examples("calibration", make_tokenizer())) + count
    assert report["seconds"]["examples"] >= 0


def test_another_tokenizer_is_refused(saved: Path, task: Task) -> None:
    make_tokenizer(before="<s>").save_pretrained(saved / "dense")
    with pytest.raises(ValueError, match=r"`dense` must .*got other tokens for the same examples"):
        heal(saved, task)
