"""The vocabulary of several tasks: that of all their examples, with the dense model scored on each with all tokens."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from healed_world import learn
from tiny_models import make_tiny_model
from toy import unhealed
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabulary_world import byte_level, load_reviews

from optimum_sieve import HealConfig, SievePruner, compare, evaluate
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.config.rules import search_count
from optimum_sieve.evaluation import stage as evaluation_stage
from optimum_sieve.pipeline.heal import heal_pruned
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.search.candidate import CONFIRM, SEARCH
from optimum_sieve.search.stage import make_scorers, make_search
from optimum_sieve.surgery.live import LiveRanks
from optimum_sieve.vocabulary.stage import reduced_vocabulary


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve import Evaluation
    from optimum_sieve.tasks import Task

QUIET: dict[str, Any] = {"progress": False}
TASK: dict[str, Any] = {"vocabulary": "task", "rank_multiple": 1, "rounds": 1}
HEAL = HealConfig(steps=4)
# Words that the texts of the first task do not have.
OTHER: dict[str, Any] = {
    "name": "other",
    "prompt": "A mountain is no parliament. {{ text }}\nAn umbrella is no",
    "labels": {"good": " volcano", "bad": " penguin"},
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Task]:
    return load_reviews(tmp_path_factory.mktemp("first")), load_reviews(tmp_path_factory.mktemp("second"), **OTHER)


@pytest.fixture(scope="module")
def dense(tasks: tuple[Task, Task]) -> PreTrainedModel:
    model = make_tiny_model("llama", vocab_size=960, initializer_range=0.05, max_position_embeddings=128)
    for task in tasks:
        model = learn(task, model, tokenizer=byte_level(), steps=30)
    return model


def make_pruner(dense: PreTrainedModel, *tasks: Task) -> SievePruner:
    return SievePruner(copy.deepcopy(dense), byte_level(), list(tasks), base_model="toy/base")


@pytest.fixture(scope="module")
def pruner(dense: PreTrainedModel, tasks: tuple[Task, Task]) -> SievePruner:
    made = make_pruner(dense, *tasks)
    made.prune(unhealed(pruning_ratio=0.3, **TASK), **QUIET)
    return made


@pytest.fixture(scope="module")
def output(pruner: SievePruner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruner.save_pretrained(tmp_path_factory.mktemp("pruned") / "model")


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, examples: Any = None) -> Evaluation:
    examples = task.examples("test", tokenizer) if examples is None else examples
    return evaluate(model, examples, tokenizer, metric=task.metric, batch_size=32, **QUIET)


def words(task: Task) -> set[str]:
    """Return the tokens of a task's calibration prompts and labels."""
    tokenizer = byte_level()
    examples = task.examples("calibration", tokenizer)
    texts = [example.prompt + text for example in examples for text in example.candidates]
    return {token for text in texts for token in tokenizer.tokenize(text)}


def test_each_task_is_scored_with_all_tokens_before_and_with_the_kept_ones_after(
    pruner: SievePruner, output: Path, dense: PreTrainedModel, tasks: tuple[Task, Task]
) -> None:
    report = pruner.result.report
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert [own["task"] for own in report["tasks"]] == ["reviews", "other"]
    for task, own in zip(tasks, report["tasks"], strict=True):
        whole, small = score(dense, byte_level(), task), score(loaded, tokenizer, task)
        assert own["dense"] == {"score": whole.score, "standard_error": whole.standard_error}
        assert own["pruned"] == {"score": small.score, "standard_error": small.standard_error}
        assert own["kl"] == pytest.approx(compare(whole, small).kl, rel=1e-4)
        assert "vocabulary" not in own
    kept = set(tokenizer.get_vocab())
    assert words(tasks[1]) - words(tasks[0])
    assert words(tasks[0]) | words(tasks[1]) <= kept
    assert report["vocabulary"] == loaded.config.sieve["vocabulary"] == {"before": 960, "after": len(tokenizer)}
    assert f"have {len(tokenizer):,} of the dense model's 960 tokens" in (output / "README.md").read_text()


def test_one_more_task_is_another_vocabulary_in_the_same_work_directory(
    dense: PreTrainedModel, tasks: tuple[Task, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments on other tokens must not be taken for those of this run; the dense model's scores may."""
    config = unhealed(tolerance=0.9, confidence=0.5, search_steps=2, **TASK)
    one = make_pruner(dense, tasks[0]).prune(config, work_dir=tmp_path, **QUIET)
    alone = make_pruner(dense, *tasks)
    expected = alone.prune(config, **QUIET)
    scored: list[str] = []

    def scoring(*args: Any, description: str, **options: Any) -> Evaluation:
        scored.append(description)
        return evaluate(*args, **options)

    monkeypatch.setattr(evaluation_stage, "evaluate", scoring)
    both = make_pruner(dense, *tasks)
    found = both.prune(config, work_dir=tmp_path, **QUIET)
    assert [text for text in scored if text.startswith("dense")] == ["dense model on selection", "dense model on test"]
    assert found.report["vocabulary"]["after"] > one.report["vocabulary"]["after"]
    assert found.report["tasks"] == expected.report["tasks"]
    before = alone.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in both.model.state_dict().items())


def test_both_tasks_are_healed_with_the_kept_tokens(dense: PreTrainedModel, tasks: tuple[Task, Task]) -> None:
    pruner = make_pruner(dense, *tasks)
    report = pruner.prune(unhealed(pruning_ratio=0.3, heal=HEAL, **TASK), **QUIET).report
    assert report["healing"]["steps"] == 4
    assert report["healing"]["examples"] == sum(task.splits["calibration"] for task in tasks)
    assert [own["task"] for own in report["tasks"]] == ["reviews", "other"]
    assert report["vocabulary"]["after"] == pruner.model.config.vocab_size == len(pruner.tokenizer)


def test_a_pruned_directory_is_healed_on_both(
    pruner: SievePruner, output: Path, dense: PreTrainedModel, tasks: tuple[Task, Task], tmp_path: Path
) -> None:
    dense.save_pretrained(tmp_path / "dense")
    byte_level().save_pretrained(tmp_path / "dense")
    result, tokenizer = heal_pruned(output, tmp_path / "dense", tasks, HEAL, device="cpu", **QUIET)
    report = pruner.result.report
    assert [own["dense"] for own in result.report["tasks"]] == [own["dense"] for own in report["tasks"]]
    assert result.report["vocabulary"] == result.model.config.sieve["vocabulary"] == report["vocabulary"]
    for task, own in zip(tasks, result.report["tasks"], strict=True):
        assert own["pruned"]["score"] == score(result.model, tokenizer, task).score


def test_the_genetic_search_compares_each_task_with_the_whole_dense_model(
    dense: PreTrainedModel, tasks: tuple[Task, Task]
) -> None:
    config = unhealed(tolerance=0.9, confidence=0.5, allocation="genetic", search_fraction=0.5, **TASK)
    model = copy.deepcopy(dense)
    given = prepare(model, byte_level(), tasks, config, work_dir=None, study_storage=None, progress=False)
    with reduced_vocabulary(given) as run:
        bases = calibrate(run)
        search = make_search(run, bases)
        with LiveRanks(model, bases) as live:
            scorers = make_scorers(run, search, live)
            nothing: dict[str, int | None] = {target.name: None for target in run.targets}
            outcomes = {part: scorers[part].score(nothing) for part in (SEARCH, CONFIRM)}
        for part, outcome in outcomes.items():
            for task, own in zip(run.tasks, outcome.parts, strict=True):
                count = search_count(config.search_fraction, len(task.selection))
                examples = task.selection[:count] if part == SEARCH else task.selection[count:]
                spec = next(one for one in tasks if one.name == task.name)
                small = score(model, run.tokenizer, spec, examples)
                expected = compare(score(dense, byte_level(), spec, examples), small).kl
                assert expected > 1e-5
                assert own.kl == pytest.approx(expected, rel=1e-3)
    assert model.config.vocab_size == 960


def test_a_genetic_search_runs_on_both(dense: PreTrainedModel, tasks: tuple[Task, Task]) -> None:
    search = {"allocation": "genetic", "population_size": 2, "generations": 1, "search_fraction": 0.5}
    config = unhealed(tolerance=0.9, confidence=0.5, **search, **TASK)
    pruner = make_pruner(dense, *tasks)
    report = pruner.prune(config, **QUIET).report
    assert len(report["tasks"]) == 2
    assert report["vocabulary"]["after"] == len(pruner.tokenizer)


def test_the_plan_counts_the_tokens_of_both(dense: PreTrainedModel, tasks: tuple[Task, Task]) -> None:
    config = unhealed(pruning_ratio=0.3, **TASK)
    both, one = (make_pruner(dense, *some).plan(config).vocabulary for some in (tasks, tasks[:1]))
    assert both["after"] > one["after"]


def test_the_task_that_does_not_fit_its_tokens_is_named(tmp_path: Path, tasks: tuple[Task, Task]) -> None:
    """Test texts of the second task just fit with all tokens, and are longer with the kept ones."""
    tokenizer = byte_level()
    prompt = "A mountain is no parliament. " * 5 + "{{ text }}\nAn umbrella is no"
    both = [tasks[0], load_reviews(tmp_path, **{**OTHER, "prompt": prompt})]
    longest = max(
        len(tokenizer(example.prompt + text)["input_ids"])
        for split in ("calibration", "selection", "test")
        for example in both[1].examples(split, tokenizer)
        for text in example.candidates
    )
    model = make_tiny_model("llama", vocab_size=960, max_position_embeddings=longest)
    with pytest.raises(ValueError, match=f"Task 'other': `examples` must fit in the {longest} tokens"):
        SievePruner(model, tokenizer, both).plan(unhealed(pruning_ratio=0.3, **TASK))
    assert SievePruner(model, tokenizer, both).plan(unhealed(pruning_ratio=0.3)).vocabulary is None
