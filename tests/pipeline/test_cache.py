"""The work directory: a result is computed again where something that it depends on changed, and only there."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed, write_rows

from optimum_sieve import HealConfig, SievePruner, evaluate
from optimum_sieve.backbone import fingerprint
from optimum_sieve.calibration import rounds
from optimum_sieve.calibration import stage as calibration_stage
from optimum_sieve.calibration.collect import collect_moments
from optimum_sieve.evaluation import stage as evaluation_stage
from optimum_sieve.evaluation.stage import score
from optimum_sieve.evaluation.teacher import teach
from optimum_sieve.factorization.closed_form import factorize
from optimum_sieve.healing import lessons as healing_lessons
from optimum_sieve.modeling.fingerprint import weights_digest
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.tasks import Task
from optimum_sieve.training.optimizer import ParameterTraining


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from optimum_sieve.run.context import Run

SPLITS = ("calibration", "selection", "test")
# 30 of them for each split; the others replace those of one.
ROWS = parity_rows(120)
TOKENIZER = make_tokenizer()
SETTINGS: dict[str, Any] = {"tolerance": 0.3, "rank_multiple": 1, "search_steps": 2, "rounds": 2}
# What the test split alone changes; the pruned model is always scored as it is.
TESTS = Counter({"dense model on test": 1, "pruned model on test": 1})


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What a run computes: moments, factored weights, teachers, and evaluations by their labels."""
    counts: Counter[str] = Counter()

    def collecting(*args: Any, **options: Any) -> Any:
        counts["moments"] += 1
        return collect_moments(*args, **options)

    def factoring(*args: Any, **options: Any) -> Any:
        counts["factors"] += 1
        return factorize(*args, **options)

    def teaching(*args: Any, **options: Any) -> Any:
        before = len(list(options["work"].path.glob("teacher-*")))
        teacher = teach(*args, **options)
        counts["teachers"] += len(list(options["work"].path.glob("teacher-*"))) - before
        return teacher

    def scoring(*args: Any, description: str, **options: Any) -> Any:
        counts[description] += 1
        return evaluate(*args, **options)

    monkeypatch.setattr(calibration_stage, "collect_moments", collecting)
    monkeypatch.setattr(calibration_stage, "factorize", factoring)
    monkeypatch.setattr(healing_lessons, "teach", teaching)
    monkeypatch.setattr(evaluation_stage, "evaluate", scoring)
    return counts


class World:
    """A task with a file for each split, which can be changed, and a work directory."""

    def __init__(self, directory: Path, counts: Counter[str]) -> None:
        self.directory, self.counts = directory, counts
        self.model = make_model()
        for number, split in enumerate(SPLITS):
            self.write(split, ROWS[30 * number :][:30])

    def write(self, split: str, rows: list[dict[str, str]]) -> None:
        """Write the rows of a split."""
        write_rows(self.directory / f"{split}.jsonl", rows)

    def task(self, **changes: Any) -> Task:
        """Read the task."""
        files = {split: f"{split}.jsonl" for split in SPLITS}
        return load_task(self.directory, **{"data": {"files": files}, **changes})

    def prune(self, tasks: Task | Sequence[Task], **settings: Any) -> Counter[str]:
        """Prune a copy of the model; return what was computed."""
        self.counts.clear()
        config = unhealed(**{**SETTINGS, **settings})
        pruner = SievePruner(copy.deepcopy(self.model), TOKENIZER, tasks)
        pruner.prune(config, work_dir=self.directory / "work", progress=False)
        return self.counts.copy()

    def run(self, task: Task) -> Run:
        """Make a run."""
        given = (copy.deepcopy(self.model), TOKENIZER, [task], unhealed(**SETTINGS))
        return prepare(*given, work_dir=self.directory / "work", study_storage=None, progress=False)


@pytest.fixture
def world(tmp_path: Path, computed: Counter[str]) -> World:
    return World(tmp_path, computed)


def test_a_run_with_nothing_changed_computes_nothing(world: World) -> None:
    first = world.prune(world.task())
    assert first["moments"] == 2
    assert first["factors"] == 28
    assert first["dense model on selection"] == 1
    assert world.prune(world.task()) == {"pruned model on test": 1}


@pytest.mark.parametrize("heal", [None, HealConfig(steps=2)])
@pytest.mark.parametrize("part", ["columns", "value", "buffer"])
def test_another_model_gets_no_result_of_the_first(world: World, part: str, heal: HealConfig | None) -> None:
    """Nor one that differs where a sample of every 64th part of a matrix, which is column 0, does not."""
    # As many sizes for every model.
    settings = {"heal": heal, **({} if heal is None else {"tolerance": None, "pruning_ratio": 0.6})}
    expected = world.prune(world.task(), **settings)
    with torch.no_grad():
        if part == "columns":
            world.model.model.layers[1].mlp.up_proj.weight[:, 1::2] = 0
        elif part == "value":
            world.model.model.layers[0].self_attn.k_proj.weight[3, 7] += 0.5
        else:
            world.model.model.rotary_emb.inv_freq[1] *= 2
    found = world.prune(world.task(), **settings)
    # Another model may be pruned to other sizes.
    for stage in ("moments", "factors", "teachers", "dense model on selection", "dense model on test"):
        assert found[stage] == expected[stage]
    assert sum(count for label, count in found.items() if label.startswith("kept")) == (2 if heal is None else 0)


@pytest.mark.parametrize("heal", [None, HealConfig(steps=2)])
def test_all_weights_are_read_once(world: World, monkeypatch: pytest.MonkeyPatch, heal: HealConfig | None) -> None:
    """Those of the dense model. A healed size is named by what it was made from."""
    models = []

    def hashing(model: Any, **options: Any) -> str:
        models.append(model)
        return weights_digest(model, **options)

    monkeypatch.setattr(fingerprint, "weights_digest", hashing)
    world.prune(world.task(), tolerance=None, pruning_ratio=0.5, heal=heal)
    assert len(models) == 1


def test_no_model_is_hashed_where_nothing_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "weights_digest", lambda *unused, **options: pytest.fail("all weights were read"))
    pruner = SievePruner(make_model(), TOKENIZER, load_task(tmp_path, ROWS))
    config = unhealed(pruning_ratio=0.5, rank_multiple=1, rounds=1, heal=HealConfig(steps=2))
    result = pruner.prune(config, progress=False)
    assert len(result.report["healing"]["sizes"]) == 1


@pytest.mark.parametrize("change", ["limit", "rows"])
def test_another_test_split_repeats_the_test_alone(world: World, change: str) -> None:
    world.prune(world.task())
    if change == "rows":
        world.write("test", ROWS[100:])
    assert world.prune(world.task(**({"limit": {"test": 20}} if change == "limit" else {}))) == TESTS


def test_other_selection_examples_repeat_the_search_alone(world: World) -> None:
    first = world.prune(world.task())
    world.write("selection", ROWS[90:])
    again = world.prune(world.task())
    assert (again["moments"], again["factors"]) == (0, 0)
    selection = {label: count for label, count in first.items() if label.endswith("selection")}
    assert len(selection) == 3
    assert again == {**selection, "pruned model on test": 1}


def test_other_calibration_examples_repeat_all_but_the_dense_scores(world: World) -> None:
    first = world.prune(world.task())
    world.write("calibration", ROWS[90:])
    again = world.prune(world.task())
    for part in ("moments", "factors", "pruned model on test"):
        assert again[part] == first[part]
    assert sum(count for label, count in again.items() if label.startswith("kept")) == 2
    assert again["dense model on selection"] == again["dense model on test"] == 0


def test_the_name_of_a_task_is_no_input(world: World) -> None:
    world.prune(world.task())
    assert world.prune(world.task(name="renamed")) == {"pruned model on test": 1}


def test_another_task_repeats_no_dense_score(world: World) -> None:
    task = world.task()
    world.prune(task)
    other = Task.from_dict({**task.spec, "name": "other", "prompt": "Number : {{ text }} ?"}, world.directory)
    both = world.prune([task, other])
    assert both["dense model on selection"] == both["dense model on test"] == 1
    # The first round of the new task, and the second of both, which takes its moments on another model.
    assert both["moments"] == 3


def test_labels_are_no_inputs_of_scores(world: World) -> None:
    run = world.run(world.task())
    for label in ("one", "other"):
        score(run, run.tasks[0], "selection", label=label)
    assert world.counts == {"one on selection": 1}
    for part in (slice(10), slice(10, None), slice(0, 10)):
        score(run, run.tasks[0], "selection", part, label="part")
    score(run, run.tasks[0], "selection", label="pruned", pruned="ranks")
    assert world.counts == {"one on selection": 1, "part on selection": 2, "pruned on selection": 1}


def test_another_metric_is_scored_again(world: World) -> None:
    run = world.run(world.task())
    other = world.run(world.task(metric="macro_f1"))
    found = [score(each, each.tasks[0], "selection", label="dense").metric for each in (run, other)]
    assert found == ["accuracy", "macro_f1"]


def custom(value: float, answer: str, accepted: Sequence[str]) -> float:
    """Score a right answer by `value`."""
    return value * (answer == accepted[0])


def doubled(answer: str, accepted: Sequence[str]) -> float:
    """Score a right answer by 2."""
    return custom(2.0, answer, accepted)


def with_metric(task: Task, directory: Path, metric: Any) -> Task:
    return Task.from_dict(task.spec, directory, metric=metric)


def test_scores_of_a_metric_without_source_are_not_cached(world: World) -> None:
    plain = world.run(world.task())
    accuracy = score(plain, plain.tasks[0], "selection", label="dense").score
    before = sorted((world.directory / "work").iterdir())
    for value in (1.0, 2.0, 2.0):
        run = world.run(with_metric(world.task(), world.directory, partial(custom, value)))
        assert score(run, run.tasks[0], "selection", label="dense").score == value * accuracy
    assert world.counts == {"dense on selection": 4}
    assert sorted((world.directory / "work").iterdir()) == before


def test_scores_of_a_function_are_cached(world: World) -> None:
    for _ in range(2):
        run = world.run(with_metric(world.task(), world.directory, doubled))
        score(run, run.tasks[0], "selection", label="dense")
    assert world.counts == {"dense on selection": 1}


def test_healed_sizes_of_a_metric_without_source_are_scored_again_and_not_trained_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = with_metric(world.task(), world.directory, partial(custom, 1.0))
    settings = {"tolerance": 0.9, "confidence": 0.5, "heal": HealConfig(steps=2, shrink=0.2)}
    first = world.prune(task, **settings)
    healed = [label for label in first if label.startswith("healed, kept")]
    assert healed
    monkeypatch.setattr(ParameterTraining, "step", None)
    again = world.prune(with_metric(world.task(), world.directory, partial(custom, 1.0)), **settings)
    assert [label for label in again if label.startswith("healed, kept")] == healed
    assert (again["moments"], again["factors"], again["teachers"]) == (0, 0, 0)


def test_a_release_repeats_nothing_and_a_new_format_does(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.prune(world.task())
    monkeypatch.setattr("optimum_sieve.__version__", "99.0")
    assert world.prune(world.task()) == {"pruned model on test": 1}
    monkeypatch.setattr(rounds, "FORMAT", rounds.FORMAT + 1)
    again = world.prune(world.task())
    assert (again["moments"], again["factors"]) == (2, 28)
    assert again["dense model on selection"] == 0


def test_sizes_share_the_rounds_they_have_in_common(world: World) -> None:
    one = {"tolerance": None, "pruning_ratio": 0.5, "rounds": 1}
    world.prune(world.task(), **one)
    assert world.prune(world.task(), **{**one, "pruning_ratio": 0.7}) == {"pruned model on test": 1}
    later = world.prune(world.task(), **{**one, "rounds": 2})
    assert (later["moments"], later["factors"]) == (1, 14)


def test_other_damping_repeats_the_factors_alone(world: World) -> None:
    one = {"tolerance": None, "pruning_ratio": 0.5, "rounds": 1}
    world.prune(world.task(), **one)
    again = world.prune(world.task(), **one, damping=0.1)
    assert (again["moments"], again["factors"]) == (0, 14)


def test_the_svd_needs_no_examples(world: World) -> None:
    svd = {"tolerance": None, "pruning_ratio": 0.5, "projection": "svd"}
    assert world.prune(world.task(), **svd)["factors"] == 14
    world.write("calibration", ROWS[90:])
    assert world.prune(world.task(), **svd)["factors"] == 0


def test_healed_sizes_depend_on_the_settings_of_healing(world: World) -> None:
    heal = HealConfig(steps=2, shrink=0.5)

    def healed(counts: Counter[str]) -> list[str]:
        return [label for label in counts if label.startswith("healed, kept")]

    first = world.prune(world.task(), heal=heal)
    # Of the calibration examples and of the crossed prompts.
    assert first["teachers"] == 2
    assert healed(first)
    # Moments of two rounds, none between the sizes.
    assert first["moments"] == 2
    assert world.prune(world.task(), heal=heal) == Counter({"pruned model on test": 1})
    assert world.prune(world.task(limit={"test": 20}), heal=heal) == TESTS
    again = world.prune(world.task(), heal=HealConfig(steps=3, shrink=0.5))
    assert healed(again)[0] == healed(first)[0]
    assert (again["moments"], again["teachers"], again["dense model on selection"]) == (0, 0, 0)
    assert world.prune(world.task()) == {"pruned model on test": 1}


def test_other_selection_examples_train_no_size_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """They decide where a descent ends, and are no input of its sizes; only no crossed prompt may be one of theirs."""
    one = {"tolerance": None, "pruning_ratio": 0.8, "heal": HealConfig(steps=2, crossed_prompts=0)}
    world.prune(world.task(), **one)
    world.write("selection", ROWS[90:])
    monkeypatch.setattr(ParameterTraining, "step", None)
    assert world.prune(world.task(), **one) == Counter({"pruned model on test": 1})
