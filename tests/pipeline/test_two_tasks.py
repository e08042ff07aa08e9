"""Several tasks in one sieve: moments add, each task is held, and what is said of each."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from healed_world import assert_same
from huggingface_hub import ModelCard
from toy import parity_rows, task_spec, unhealed, write_rows
from transformers import AutoModelForCausalLM
from two_tasks import QUIET, TOKENIZER, learn_both, make_pruner, make_tasks, score

from optimum_sieve import HealConfig, SieveConfig, SievePruner, compare
from optimum_sieve.backbone.targets import linear_weight
from optimum_sieve.calibration import stage as calibration_stage
from optimum_sieve.calibration.collect import collect_moments
from optimum_sieve.calibration.sampled import CalibrationExamples
from optimum_sieve.calibration.stage import WholeRound, calibrate, collect
from optimum_sieve.evaluation import stage as evaluation_stage
from optimum_sieve.evaluation.scores import evaluate
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.publish.recipe import Recipe


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.factorization.moments import Moments
    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Task

TWO_TASKS_TOLERANCE = 0.1
SEARCH: dict[str, Any] = {"tolerance": TWO_TASKS_TOLERANCE, "rank_multiple": 1, "rounds": 1, "confidence": 0.5}
HALF: dict[str, Any] = {"pruning_ratio": 0.5, "rank_multiple": 1}
# So far that much is lost on any machine: rounding decides how well the toy model has learned.
FAR: dict[str, Any] = {"pruning_ratio": 0.95, "rank_multiple": 1, "rounds": 1}
HEALED: dict[str, Any] = {"heal": HealConfig(steps=48, learning_rate=1e-2)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Task]:
    return make_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def dense(tasks: tuple[Task, Task]) -> PreTrainedModel:
    return learn_both(tasks)


@pytest.fixture
def pruner(dense: PreTrainedModel, tasks: tuple[Task, Task]) -> SievePruner:
    return make_pruner(dense, *tasks)


def setting_of(model: PreTrainedModel, tasks: Any, **settings: Any) -> Run:
    config = unhealed(**{**HALF, "rounds": 1, **settings})
    return prepare(model, TOKENIZER, tasks, config, work_dir=None, study_storage=None, progress=False)


def moments_of(run: Run) -> dict[str, Moments]:
    weights = {target.name: linear_weight(run.model.get_submodule(target.name)) for target in run.targets}
    return collect(WholeRound(run), [CalibrationExamples(task.calibration) for task in run.tasks], weights)


def test_the_model_of_these_tests_does_both_tasks(dense: PreTrainedModel, tasks: tuple[Task, Task]) -> None:
    assert [score(dense, task).score > 0.85 for task in tasks] == [True, True]


@pytest.mark.parametrize("projection", ["joint", "activation"])
def test_moments_of_two_parts_are_those_of_the_whole(
    dense: PreTrainedModel, tasks: tuple[Task, Task], projection: str
) -> None:
    """With weights that are the parts' sizes, as if all examples were of one task."""
    whole = setting_of(dense, tasks[:1], projection=projection)
    only = whole.tasks[0]
    first, second = only.calibration[:100], only.calibration[100:]
    parts = tuple(
        dataclasses.replace(only, name=name, calibration=part, weight=len(part) / len(only.calibration))
        for name, part in (("first", first), ("second", second))
    )
    expected, found = moments_of(whole), moments_of(dataclasses.replace(whole, tasks=parts))
    assert expected.keys() == found.keys()
    for name, own in expected.items():
        for field, tensor in own.tensors().items():
            largest = float(tensor.abs().max())
            torch.testing.assert_close(getattr(found[name], field), tensor, rtol=1e-4, atol=1e-5 * largest)


def test_one_task_has_the_moments_it_has_alone(dense: PreTrainedModel, tasks: tuple[Task, Task]) -> None:
    both, alone = setting_of(dense, tasks), setting_of(dense, tasks[:1])
    pair, single = WholeRound(both), WholeRound(alone)
    assert pair.moments_key(both.tasks[0]) == single.moments_key(alone.tasks[0])
    assert pair.key != single.key
    assert alone.tasks[0].weight == 1.0
    assert [task.weight for task in both.tasks] == [0.5, 0.5]


def test_only_the_ratios_of_the_weights_matter(dense: PreTrainedModel, tasks: tuple[Task, Task]) -> None:
    two, four, other = (setting_of(dense, tasks, task_weights=weights) for weights in ((1, 2), (2.0, 4.0), (2, 1)))
    assert WholeRound(two).key == WholeRound(four).key != WholeRound(other).key
    first, second = (calibrate(run) for run in (two, other))
    assert any(not torch.equal(first[name].energy, second[name].energy) for name in first)


def divergences(model: PreTrainedModel, dense: PreTrainedModel, tasks: tuple[Task, Task]) -> list[float]:
    found = [compare(score(dense, task), score(model, task)).kl for task in tasks]
    return [kl for kl in found if kl is not None]


def test_a_model_pruned_for_both_does_both(dense: PreTrainedModel, tasks: tuple[Task, Task]) -> None:
    config = unhealed(**{**HALF, "pruning_ratio": 0.7})
    alone = make_pruner(dense, tasks[0]).prune(config, **QUIET)
    both = make_pruner(dense, *tasks).prune(config, **QUIET)
    assert [own["task"] for own in both.report["tasks"]] == ["parity", "size"]
    assert both.report["tasks"][1]["kl"] < 0.5 * divergences(alone.model, dense, tasks)[1]


def test_the_heavier_task_is_kept_better(dense: PreTrainedModel, tasks: tuple[Task, Task]) -> None:
    found = []
    # At larger sizes both divergences are rounding.
    for weights in ((20, 1), (1, 20)):
        config = unhealed(**{**HALF, "pruning_ratio": 0.85}, task_weights=weights)
        found.append([own["kl"] for own in make_pruner(dense, *tasks).prune(config, **QUIET).report["tasks"]])
    (first_heavy, first_light), (second_light, second_heavy) = found
    assert first_heavy < second_light
    assert second_heavy < first_light


def test_the_size_found_holds_the_tolerance_on_each_task(
    dense: PreTrainedModel, tasks: tuple[Task, Task], pruner: SievePruner
) -> None:
    result = pruner.prune(unhealed(**SEARCH), **QUIET)
    held = {
        trial["kept"]: all(own["mean"] >= -TWO_TASKS_TOLERANCE for own in trial["tasks"].values())
        for trial in result.trials
    }
    parameters = result.report["parameters"]
    chosen = min(kept for kept, holds in held.items() if holds)
    assert parameters["targets_after"] / parameters["targets_before"] == pytest.approx(chosen, abs=0.01)
    for task in tasks:
        against = compare(score(dense, task, "selection"), score(result.model, task, "selection"))
        assert against.mean >= -TWO_TASKS_TOLERANCE
    # On some size that was given up, one task alone was below the tolerance.
    failed = [trial for trial in result.trials if not held[trial["kept"]]]
    assert failed
    assert all(trial["lower_bound"] == min(own["lower_bound"] for own in trial["tasks"].values()) for trial in failed)


def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[str]]:
    """Note the examples of every collection of moments, and what is scored."""
    collected: list[int] = []
    scored: list[str] = []

    def collecting(*args: Any, num_examples: int, **options: Any) -> Any:
        collected.append(num_examples)
        return collect_moments(*args, num_examples=num_examples, **options)

    def scoring(*args: Any, description: str, **options: Any) -> Any:
        scored.append(description)
        return evaluate(*args, **options)

    monkeypatch.setattr(calibration_stage, "collect_moments", collecting)
    monkeypatch.setattr(evaluation_stage, "evaluate", scoring)
    return collected, scored


def test_adding_a_task_repeats_nothing_of_the_others(
    dense: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity, size = make_tasks(tmp_path, limit={"calibration": 90})
    config, work = unhealed(**{**SEARCH, "search_steps": 2, "rounds": 2}), {"work_dir": tmp_path / "work", **QUIET}
    make_pruner(dense, parity).prune(config, **work)
    collected, scored = watched(monkeypatch)
    make_pruner(dense, parity, size).prune(config, **work)
    # The second round is of a model that depends on both.
    assert collected == [90, parity.splits["calibration"], 90]
    assert [text for text in scored if text.startswith("dense")] == [
        "dense model on selection",
        "dense model on test",
    ]
    collected.clear()
    result = make_pruner(dense, parity, size).prune(config, **work)
    assert collected == []
    again = make_pruner(dense, size, parity).prune(config, **work)
    assert {trial["kept"] for trial in again.trials} == {trial["kept"] for trial in result.trials}


def test_report_card_and_configuration_have_a_row_for_each_task(
    dense: PreTrainedModel, tasks: tuple[Task, Task], pruner: SievePruner, tmp_path: Path
) -> None:
    config = unhealed(**HALF, task_weights=(2, 1))
    result = pruner.prune(config, **QUIET)
    directory = pruner.save_pretrained(tmp_path / "out")
    report = json.loads((directory / "sieve_report.json").read_text())
    assert set(report) == {
        *("tasks", "parameters", "bytes", "seconds", "settings", "versions", "largest_coefficient"),
        *("weights_sha256", "base_model", "ranks", "spectra", "parts"),
    }
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    for task, own in zip(tasks, report["tasks"], strict=True):
        assert set(own) == {
            *("task", "split", "metric", "count", "majority_score", "dense", "pruned", "paired_difference"),
            *("agreement", "kl", "error_method", "answers", "examples_sha256"),
        }
        assert own["pruned"]["score"] == score(loaded, task).score
        assert own["dense"]["score"] == score(dense, task).score
        assert own["count"] == task.splits["test"]
    assert [own["task"] for own in loaded.config.sieve["results"]["tasks"]] == ["parity", "size"]
    assert loaded.config.sieve["settings"]["task_weights"] == [2.0, 1.0]
    assert SieveConfig.from_dict(report["settings"]) == config

    card = ModelCard.load(directory / "README.md")
    assert [(one.dataset_name, one.metric_name) for one in card.data.eval_results] == [
        (name, f"accuracy ({side} model)") for name in ("parity", "size") for side in ("pruned", "dense")
    ]
    rows = [line for line in card.text.splitlines() if line.startswith(("| `parity`", "| `size`"))]
    assert len(rows) == 2
    for row, own in zip(rows, result.report["tasks"], strict=True):
        assert f"{own['pruned']['score']:.4f} ± {own['pruned']['standard_error']:.4f}" in row
    recipe = Recipe.from_file(directory / "sieve.yaml")
    assert (recipe.tasks, recipe.config()) == ([task.spec for task in tasks], config)
    specs = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", card.text, flags=re.DOTALL)[1:]]
    assert specs == [task.spec for task in tasks]
    assert "\n\n\n" not in card.text


def test_both_tasks_are_healed_by_their_own_losses(
    dense: PreTrainedModel, tasks: tuple[Task, Task], pruner: SievePruner, tmp_path: Path
) -> None:
    plain = make_pruner(dense, *tasks).prune(unhealed(**FAR), **QUIET).report
    config = unhealed(**FAR, **HEALED)
    result = pruner.prune(config, work_dir=tmp_path / "work", **QUIET)
    for before, after in zip(plain["tasks"], result.report["tasks"], strict=True):
        assert after["kl"] < 0.8 * before["kl"]
    healing = result.report["healing"]
    assert healing["examples"] == sum(task.splits["calibration"] for task in tasks)
    assert [size["asked"] for size in healing["sizes"]] == HEALED["heal"].sizes_to(1 - FAR["pruning_ratio"])
    again = make_pruner(dense, *tasks).prune(config, work_dir=tmp_path / "work", **QUIET)
    assert_same(again.model.state_dict(), result.model.state_dict())
    card = (pruner.save_pretrained(tmp_path / "out") / "README.md").read_text()
    assert f"trained for {healing['steps']} steps on 600 calibration examples" in card


def test_each_size_of_the_descent_is_held_to_every_task(
    dense: PreTrainedModel, tasks: tuple[Task, Task], pruner: SievePruner
) -> None:
    heal = HealConfig(steps=8, learning_rate=1e-2)
    result = pruner.prune(unhealed(**SEARCH, heal=heal), **QUIET)
    trials = [trial for trial in result.trials if trial.get("healed")]
    assert trials
    for trial in trials:
        assert {name: own["count"] for name, own in trial["tasks"].items()} == {"parity": 150, "size": 150}
        assert trial["lower_bound"] == min(own["lower_bound"] for own in trial["tasks"].values())
        assert trial["accepted"] == (trial["lower_bound"] >= -TWO_TASKS_TOLERANCE)
    # Until two in a row fail, or no size is left.
    failed = [not trial["accepted"] for trial in trials]
    assert not any(a and b for a, b in pairwise(failed[:-1]))
    assert result.report["stopped"]["healed"] in ("refused", "smallest_size")
    for task in tasks:
        against = compare(score(dense, task, "selection"), score(result.model, task, "selection"))
        assert against.mean >= -TWO_TASKS_TOLERANCE


def test_tasks_of_different_kinds_go_together(dense: PreTrainedModel, tmp_path: Path) -> None:
    """Healed at every size tried, with a task of labels and one whose answers are written."""
    written = {"name": "written", "kind": "generate", "labels": None, "max_new_tokens": 3, "metric": "exact_match"}
    tasks = make_tasks(tmp_path, 120, **written, answer="{{ label }}", prompt="Number: {{ text }} Parity:")
    config = unhealed(**{**SEARCH, "tolerance": 0.3, "search_steps": 3}, heal=HealConfig(steps=4))
    result = make_pruner(dense, *tasks).prune(config, **QUIET)
    assert [own["metric"] for own in result.report["tasks"]] == ["accuracy", "exact_match"]
    assert ["kl" in own for own in result.report["tasks"]] == [True, False]
    assert [trial.get("healed", False) for trial in result.trials][:4] == [False, False, False, True]


def test_answers_of_the_dense_model_stand_in_where_a_task_has_none(dense: PreTrainedModel, tmp_path: Path) -> None:
    tasks = make_tasks(tmp_path, 120, answer=None)
    report = make_pruner(dense, *tasks).prune(unhealed(**HALF, label_source="model"), **QUIET).report
    assert "references" not in report["tasks"][0]
    assert report["tasks"][1]["references"] == "dense model"
    assert report["tasks"][1]["dense"]["score"] == 1.0


def test_the_plan_lists_the_examples_of_each_task(pruner: SievePruner, tasks: tuple[Task, Task]) -> None:
    plan = pruner.plan(unhealed(**HALF))
    assert plan.examples == {task.name: task.splits for task in tasks}
    lines = [line for line in plan.format().splitlines() if line.startswith("examples")]
    assert lines == [
        f"examples               {name}: calibration 300, selection 150, test 150" for name in ("parity", "size")
    ]
    one = make_pruner(pruner.model, tasks[0]).plan(unhealed(**HALF))
    # Those of one task while those of the other are added.
    assert plan.moments_bytes == 2 * one.moments_bytes


def test_two_tasks_of_one_name_are_refused(dense: PreTrainedModel, tasks: tuple[Task, Task]) -> None:
    with pytest.raises(ValueError, match="`task` must be tasks with unique names, got 2 called 'parity'"):
        make_pruner(dense, tasks[0], tasks[1], tasks[0])
    with pytest.raises(ValueError, match="`task` must name at least one task, got none"):
        make_pruner(dense)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ((1, 2, 3), ValueError, "`task_weights` must have one number per task, got 3 for 2 tasks"),
        ((1,), ValueError, "`task_weights` must have one number per task, got 1 for 2 tasks"),
        ((1, 0), ValueError, r"`task_weights` must be above 0 .*, got 0\. Omit a task that should not count"),
        ((1, -2.0), ValueError, r"`task_weights` must be above 0 .*, got -2\.0"),
        ((1, float("nan")), ValueError, "`task_weights` must be above 0 .*, got nan"),
        ((), ValueError, "`task_weights` must have one number for each task, got none"),
        ((1, "2"), TypeError, "`task_weights` must be a number, got '2'"),
        (2, TypeError, "`task_weights` must be a sequence of numbers, got 2"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    pruner: SievePruner, weights: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_stage, "collect_moments", None)
    with pytest.raises(error, match=message):
        pruner.prune(unhealed(**HALF, task_weights=weights), **QUIET)


def test_what_is_wrong_with_one_task_names_it(
    dense: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_stage, "collect_moments", None)
    for changes, message in (
        ({"prompt": "Number : {{ text }} " + "? " * 70}, "Task 'size': `examples` must fit in the 64 tokens"),
        ({"answer": None}, "Task 'size': `answer` must be given in the task file"),
    ):
        with pytest.raises(ValueError, match=message):
            make_pruner(dense, *make_tasks(tmp_path, 60, **changes)).prune(unhealed(**HALF), **QUIET)
    write_rows(tmp_path / "rows.jsonl", parity_rows(60))
    (tmp_path / "good.json").write_text(json.dumps(task_spec()))
    (tmp_path / "bad.json").write_text(json.dumps(task_spec(name="other", kind="lables")))
    files = [tmp_path / "good.json", tmp_path / "bad.json"]
    with pytest.raises(ValueError, match=r"Task '.*bad\.json': `kind` must be one of labels"):
        SievePruner.from_pretrained(dense, tokenizer=TOKENIZER, task=files)


def test_a_single_task_in_a_list_is_that_task(dense: PreTrainedModel, tasks: tuple[Task, Task]) -> None:
    config = unhealed(**{**HALF, "rounds": 1})
    listed = make_pruner(dense, tasks[0]).prune(config, **QUIET)
    alone = SievePruner(copy.deepcopy(dense), TOKENIZER, tasks[0]).prune(config, **QUIET)
    assert listed.rank_pattern == alone.rank_pattern
    assert listed.report["pruned"] == alone.report["pruned"]
    assert "tasks" not in listed.report
