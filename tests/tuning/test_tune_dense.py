"""Tuning within a run: the tuned model takes the place of the dense one, and three models are reported."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import toy
from healed_world import TOKENIZER, assert_same, weights
from safetensors.torch import load_file
from tiny_models import make_tiny_model
from toy import load_task, make_model, parity_rows, unhealed, write_task
from transformers import AutoModelForCausalLM
from two_processes import run_in_two_processes
from two_tasks import make_tasks
from vocabulary_world import byte_level, load_reviews

from optimum_sieve import HealConfig, SieveConfig, SievePruner, TuneConfig, compare, evaluate
from optimum_sieve import pruner as pruner_module
from optimum_sieve.allocation.tolerance import ToleranceError
from optimum_sieve.pipeline.heal import heal_pruned
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.tuning import stage
from optimum_sieve.tuning.loop import train
from optimum_sieve.tuning.stage import tune_dense


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_sieve import Evaluation
    from optimum_sieve.tasks import Task

TUNE = TuneConfig(steps=40, learning_rate=2e-2)
QUIET: dict[str, Any] = {"progress": False}
HALF: dict[str, Any] = {"pruning_ratio": 0.5, "rank_multiple": 1, "rounds": 1, "tune": TUNE}


def make_pruner(dense: PreTrainedModel, *tasks: Task) -> SievePruner:
    return SievePruner(copy.deepcopy(dense), TOKENIZER, tasks, base_model="toy/base")


def score(model: PreTrainedModel, task: Task, split: str = "test") -> Evaluation:
    examples = list(task.examples(split, TOKENIZER))
    return evaluate(model, examples, TOKENIZER, metric=task.metric, batch_size=32, **QUIET)


def tuned_copy(dense: PreTrainedModel, *tasks: Task, tune: TuneConfig = TUNE) -> PreTrainedModel:
    """Return a tuned copy of the dense model."""
    model = copy.deepcopy(dense)
    config = unhealed(**{**HALF, "tune": tune})
    train(prepare(model, TOKENIZER, list(tasks), config, work_dir=None, study_storage=None, **QUIET))[0].merge()
    return model


def test_three_models_are_scored_and_reported(dense: PreTrainedModel, task: Task, tmp_path: Path) -> None:
    pruner = make_pruner(dense, task)
    result = pruner.prune(unhealed(**HALF), **QUIET)
    before, tuned, after = score(dense, task), score(tuned_copy(dense, task), task), score(result.model, task)
    report = result.report
    assert before.score < 0.2 < 0.9 < tuned.score
    for name, evaluation in (("dense", before), ("tuned", tuned), ("pruned", after)):
        expected = {"score": evaluation.score, "standard_error": evaluation.standard_error}
        assert report[name] == pytest.approx(expected), name
    for name, other in (("paired_difference", before), ("difference_to_tuned", tuned)):
        difference = compare(other, after)
        expected = {"mean": difference.mean, "standard_error": difference.standard_error}
        assert report[name] == pytest.approx(expected), name
    to_tuned = compare(tuned, after)
    assert report["agreement"] == to_tuned.agreement
    assert report["kl"] == pytest.approx(to_tuned.kl, abs=1e-5)
    tuning = report["tuning"]
    assert {"rank": 8, "steps": 40, "examples": 300}.items() <= tuning.items()
    (selection,) = tuning["selection"]
    splits = (score(dense, task, "selection"), score(tuned_copy(dense, task), task, "selection"))
    assert (selection["dense"], selection["tuned"]) == (splits[0].score, splits[1].score)
    assert selection["mean"] == pytest.approx(splits[1].score - splits[0].score)
    assert (result.scores[0].dense.score, result.scores[0].pruned.score) == (before.score, after.score)
    assert report["settings"]["tune"] == TUNE.to_dict()
    assert report["seconds"]["tuning"] > 0

    directory = pruner.save_pretrained(tmp_path / "pruned")
    assert json.loads((directory / "config.json").read_text())["sieve"]["results"]["tuned"] == report["tuned"]
    card = (directory / "README.md").read_text()
    for line in (
        f"| dense model | {before.score:.4f} |",
        f"| tuned model | {tuned.score:.4f} |",
        f"| pruned model | {after.score:.4f} |",
        f"| pruned - dense, paired | {after.score - before.score:+.4f} |",
        f"| pruned - tuned, paired | {after.score - tuned.score:+.4f} |",
        "optimum-cli sieve run sieve.yaml --data-dir DIR",
        "LoRA adapters of rank 8, trained for 40 steps",
    ):
        assert line in card
    with pytest.raises(ValueError, match=r"`model` must be pruned from `dense` as it is, got one that was tuned first"):
        heal_pruned(directory, tmp_path / "dense", [task], HealConfig(), **QUIET)


def test_a_card_of_two_tasks_has_both_differences(dense: PreTrainedModel, tmp_path: Path) -> None:
    pruner = make_pruner(dense, *make_tasks(tmp_path, 200))
    result = pruner.prune(unhealed(**{**HALF, "tune": TuneConfig(steps=2)}), **QUIET)
    assert [row["task"] for row in result.report["tuning"]["selection"]] == ["parity", "size"]
    card = (pruner.save_pretrained(tmp_path / "pruned") / "README.md").read_text()
    header, rule, *rows = [line for line in card.split("## Scores")[1].split("## Size")[0].splitlines() if "|" in line]
    assert "dense | tuned | pruned | difference | pruned - tuned | most frequent answer" in header
    assert {line.count("|") for line in (header, rule, *rows)} == {12}
    assert len(rows) == 2


def test_the_tuned_model_is_the_reference_of_healing_and_the_tolerance(dense: PreTrainedModel, task: Task) -> None:
    """Nothing may be lost against the tuned model, though the dense one is wrong on every example."""
    pruner = make_pruner(dense, task)
    settings = {**HALF, "pruning_ratio": None, "tolerance": 0.05, "heal": HealConfig(steps=8, learning_rate=1e-2)}
    report = pruner.prune(unhealed(**settings, reference="tuned"), **QUIET).report
    assert report["difference_to_tuned"]["mean"] > -0.15
    assert report["paired_difference"]["mean"] > 0.6
    assert report["parameters"]["targets_after"] < report["parameters"]["targets_before"]


@pytest.fixture
def reviews(tmp_path: Path) -> tuple[SievePruner, PreTrainedModel]:
    """A pruner of reviews whose tokenizer can be reduced, and a copy of its model."""
    model = make_tiny_model("llama", vocab_size=960, initializer_range=0.05, max_position_embeddings=128)
    return SievePruner(copy.deepcopy(model), byte_level(), load_reviews(tmp_path)), model


def test_a_vocabulary_is_reduced_after_tuning(reviews: tuple[SievePruner, PreTrainedModel]) -> None:
    pruner, dense = reviews
    task, tokenizer = pruner.tasks[0], pruner.tokenizer
    report = pruner.prune(unhealed(**HALF, vocabulary="task"), **QUIET).report
    run = prepare(dense, tokenizer, [task], unhealed(**HALF), work_dir=None, study_storage=None, **QUIET)
    examples = list(task.examples("test", tokenizer))
    for name in ("dense", "tuned"):
        scored = evaluate(dense, examples, tokenizer, metric=task.metric, batch_size=16, **QUIET)
        assert report[name]["score"] == scored.score
        train(run)[0].merge()
    assert report["tuned"]["score"] > report["dense"]["score"]
    assert report["vocabulary"]["after"] < report["vocabulary"]["before"] == 960


def test_results_of_the_untuned_model_are_not_those_of_the_tuned_one(
    dense: PreTrainedModel, task: Task, tmp_path: Path
) -> None:
    """A work directory that holds all results of one serves the other nothing but its scores before tuning."""
    expected = make_pruner(dense, task).prune(unhealed(**HALF), **QUIET)
    untuned = {**HALF, "tune": None}
    for settings in (untuned, HALF, HALF):
        result = make_pruner(dense, task).prune(unhealed(**settings), work_dir=tmp_path, **QUIET)
    assert_same(weights(result.model), weights(expected.model))
    assert len(list(tmp_path.glob("tuned-*"))) == 1
    assert len(list(tmp_path.glob("bases-*"))) == 2


@pytest.mark.parametrize("stage_name", ["calibrate", "choose_ranks", "score_test_pruned"])
def test_an_error_of_a_later_stage_restores_the_dense_model(
    reviews: tuple[SievePruner, PreTrainedModel], monkeypatch: pytest.MonkeyPatch, stage_name: str
) -> None:
    pruner, dense = reviews
    monkeypatch.setattr(pruner_module, stage_name, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(unhealed(**HALF, vocabulary="task"), **QUIET)
    assert_same(weights(pruner.model), weights(dense))


def test_an_error_after_the_merge_restores_the_dense_model(
    dense: PreTrainedModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = make_pruner(dense, task)
    monkeypatch.setattr(stage, "compare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(unhealed(**HALF), **QUIET)
    assert_same(weights(pruner.model), weights(dense))


def test_a_tolerance_that_no_size_meets_restores_the_dense_model(
    dense: PreTrainedModel, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = make_pruner(dense, task)

    def impossible(*_: Any, **__: Any) -> Any:
        raise ToleranceError("No size.")

    monkeypatch.setattr(pruner_module, "choose_ranks", impossible)
    with pytest.raises(ToleranceError):
        pruner.prune(unhealed(**{**HALF, "pruning_ratio": None, "tolerance": 0.01}), **QUIET)
    assert_same(weights(pruner.model), weights(dense))


def test_tuning_that_lowers_the_score_is_warned_of(
    dense: PreTrainedModel, task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    tuned = tuned_copy(dense, task)
    exchanged = TuneConfig(steps=40, learning_rate=0.9)
    run = prepare(tuned, TOKENIZER, [task], unhealed(**{**HALF, "tune": exchanged}), work_dir=None, study_storage=None,
                  **QUIET)  # fmt: skip
    start = weights(tuned)
    # The model is pruned as it came.
    assert tune_dense(run) is run
    assert "Tuning lowers the score on the selection split of 'parity' from" in caplog.text
    assert "Lower `tune.steps` or `tune.learning_rate`" in caplog.text
    assert_same(weights(tuned), start)


def test_a_run_that_heals_tunes_where_there_are_gold_answers(
    dense: PreTrainedModel, task: Task, tmp_path: Path
) -> None:
    def tunes(task: Task, **settings: Any) -> bool:
        config = SieveConfig(**settings)
        run = prepare(dense, TOKENIZER, [task], config, work_dir=None, study_storage=None, **QUIET)
        return run.config.tune == TuneConfig()

    unlabelled = load_task(tmp_path, parity_rows(60), answer=None)
    assert tunes(task, tolerance=0.02)
    assert tunes(task, pruning_ratio=0.5)
    assert not tunes(task, tolerance=0.02, heal=None)
    assert not tunes(task, tolerance=0.02, tune=None)
    assert not tunes(task, tolerance=0.02, allocation="genetic")
    assert not tunes(unlabelled, tolerance=0.02, label_source="model")


def test_the_tolerance_is_measured_from_the_dense_model_by_default(
    dense: PreTrainedModel, task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    """The dense model is wrong on every example, so that any size holds; nothing may be lost against the tuned one."""
    settings = {**HALF, "pruning_ratio": None, "tolerance": 0.05, "search_steps": 6}
    sizes, behind = {}, {}
    for reference in ("dense", "tuned"):
        caplog.clear()
        report = make_pruner(dense, task).prune(unhealed(**settings, reference=reference), **QUIET).report
        sizes[reference] = report["parameters"]["targets_after"]
        behind[reference] = report["difference_to_tuned"]["mean"] < -0.05
        warned = '`reference="tuned"` measures it from the tuned model' in caplog.text
        assert warned == (reference == "dense" and behind[reference])
    assert sizes["dense"] < sizes["tuned"]
    assert behind["dense"]


@pytest.mark.parametrize("source", ["data", "model"])
def test_tasks_without_answers_are_refused(dense: PreTrainedModel, tmp_path: Path, source: str) -> None:
    pruner = make_pruner(dense, load_task(tmp_path, parity_rows(60), answer=None))
    with pytest.raises(ValueError, match="`tune` must go with gold answers, got a task file without `answer`"):
        pruner.prune(unhealed(**HALF, label_source=source), **QUIET)


def test_searches_that_workers_join_are_refused(dense: PreTrainedModel, task: Task, tmp_path: Path) -> None:
    pruner, config = make_pruner(dense, task), unhealed(**HALF, allocation="genetic", reference="tuned")
    message = r"`tune` must be None for a search that workers can join, got TuneConfig\(rank=8, steps=40"
    with pytest.raises(ValueError, match=message):
        pruner.search(config, **QUIET)
    with pytest.raises(ValueError, match=message):
        pruner.join_search(config, work_dir=tmp_path, **QUIET)


def test_a_genetic_search_in_one_process_searches_the_tuned_model(dense: PreTrainedModel, task: Task) -> None:
    small = {"allocation": "genetic", "population_size": 2, "generations": 1}
    report = make_pruner(dense, task).prune(unhealed(**HALF, **small), **QUIET).report
    assert report["pruned"]["score"] > 0.7 > 0.2 > report["dense"]["score"]


def test_a_run_by_blocks_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path, parity_rows(120))
    toy.make_model(num_hidden_layers=4).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    paths: dict[str, Any] = {"task": tmp_path / "task.json", "device": "cpu"}
    message = r"`tune` must go with {}, got .*: with less, one block of the model is held at a time"
    offloaded = SievePruner.from_pretrained(tmp_path / "base", **paths, offload_dir=tmp_path)
    with pytest.raises(ValueError, match=message.format("a model in memory")):
        offloaded.prune(unhealed(**HALF), work_dir=tmp_path / "work", **QUIET)
    limited = SievePruner.from_pretrained(tmp_path / "base", **paths)
    with pytest.raises(ValueError, match=message.format(r"a `memory_limit` of .* or more")):
        limited.plan(unhealed(**HALF, memory_limit="150KB"))


def test_the_plan_counts_the_copy_and_the_adapters(dense: PreTrainedModel, task: Task) -> None:
    pruner = make_pruner(dense, task)
    plan, without = (pruner.plan(unhealed(**{**HALF, "tune": tune})) for tune in (TUNE, None))
    adapters = train(prepare(pruner.model, TOKENIZER, [task], unhealed(**HALF), work_dir=None, study_storage=None,
                             **QUIET))[0]  # fmt: skip
    trained = sum(value.numel() for value in adapters.values().values())
    assert plan.tune_bytes == 16 * trained + 4 * plan.targets_parameters
    assert plan.whole_bytes == without.whole_bytes + plan.tune_bytes
    assert "tuning                 40 steps of 16 examples, LoRA of rank 8" in plan.format()
    assert "tuning" not in without.format()


DISTRIBUTED = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import torch
torch.distributed.init_process_group("gloo")
from safetensors.torch import save_file
from toy import make_tokenizer, unhealed
from transformers import AutoModelForCausalLM
from optimum_sieve import TuneConfig
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.tasks import Task
from optimum_sieve.tuning.loop import train

directory = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(directory / "dense")
config = unhealed(pruning_ratio=0.5, batch_size=4, tune=TuneConfig(steps=20, learning_rate=1e-3))
run = prepare(model, make_tokenizer(), [Task.from_file(directory / "task.json")], config,
              work_dir=directory / "work", study_storage=None, progress=False)
adapters, training, _ = train(run)
save_file({**adapters.values(), "losses": torch.tensor(training.losses)},
          directory / f"tuned-{torch.distributed.get_rank()}.safetensors")
"""


def test_two_processes_take_the_steps_of_one(dense: PreTrainedModel, tmp_path: Path) -> None:
    task = load_task(tmp_path, parity_rows(600), labels={"odd": " even", "even": " odd"})
    dense.save_pretrained(tmp_path / "dense")
    support = Path(toy.__file__).parent
    run_in_two_processes(DISTRIBUTED, tmp_path, tmp_path, str(support), str(support.parents[1]))
    both = [load_file(tmp_path / f"tuned-{rank}.safetensors") for rank in (0, 1)]
    assert_same(both[0], both[1])
    assert len(list((tmp_path / "work").iterdir())) == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    config = unhealed(pruning_ratio=0.5, batch_size=4, tune=TuneConfig(steps=20, learning_rate=1e-3))
    adapters, training, _ = train(
        prepare(model, TOKENIZER, [task], config, work_dir=None, study_storage=None, progress=False)
    )
    assert both[0].pop("losses").tolist() == pytest.approx(training.losses, rel=1e-4)
    for name, value in adapters.values().items():
        if name.endswith(".left"):
            assert (both[0][name] - value).norm() < 0.02 * value.norm(), name


def test_the_tuned_reference_needs_no_settings_of_tuning(task: Task, tmp_path: Path) -> None:
    pruner = SievePruner(make_model(), TOKENIZER, task)
    assert "tuning " in pruner.plan(SieveConfig(tolerance=0.1, reference="tuned")).format()
    # Tuning was asked for, so a search may be measured from the tuned model too.
    searched = SieveConfig(tolerance=0.1, reference="tuned", tune=TuneConfig(), allocation="genetic")
    assert "tuning " in pruner.plan(searched).format()
    message = "`reference` must be 'dense' where `tune='auto'` does not tune, got 'tuned'"
    with pytest.raises(ValueError, match=message):
        pruner.plan(SieveConfig(tolerance=0.1, reference="tuned", heal=None))
    unlabelled = SievePruner(make_model(), TOKENIZER, load_task(tmp_path, parity_rows(90), answer=None))
    with pytest.raises(ValueError, match=message):
        unlabelled.plan(SieveConfig(tolerance=0.1, reference="tuned", label_source="model"))
