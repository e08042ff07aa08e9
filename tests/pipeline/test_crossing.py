"""Crossed prompts: the beginning of one calibration prompt and the end of another, for moments and healing alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from healed_world import TOKENIZER, learn
from toy import load_task, parity_rows, unhealed

from optimum_sieve import HealConfig, SieveConfig, SievePruner
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.healing.stage import make_lessons
from optimum_sieve.pipeline.crossing import crossed_examples
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.tasks import Example


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.tasks import Task

QUIET: dict[str, Any] = {"progress": False}
TEXTS = ("one two three four", "five six seven", "eight nine ten eleven twelve", "a b c")


def examples(texts: tuple[str, ...] = TEXTS, form: str = "Read: {}\nIs it good?\nAnswer:") -> list[Example]:
    return [Example(prompt=form.format(text), answer=" yes", candidates=(" yes", " no"), target=0) for text in texts]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(tmp_path_factory.mktemp("task"), parity_rows(180))


@pytest.fixture(scope="module")
def dense(task: Task) -> PreTrainedModel:
    return learn(task)


def test_a_prompt_is_the_beginning_of_one_and_the_end_of_another() -> None:
    found = crossed_examples(examples(), 20, seed=0)
    assert len({example.prompt for example in found}) == 20
    bodies = [text.split(" ") for text in TEXTS]
    for example in found:
        assert (example.answer, example.target, example.candidates) == ("", None, (" yes", " no"))
        begin, body, end = example.prompt.partition("Read: ")[1], example.prompt[6:-20], example.prompt[-20:]
        assert (begin, end) == ("Read: ", "\nIs it good?\nAnswer:")
        words = body.split(" ")
        assert any(
            words == first[:cut] + second[len(second) - (len(words) - cut) :]
            for first in bodies for second in bodies for cut in range(len(words) + 1)
            if cut <= len(first) and len(words) - cut <= len(second)
        )  # fmt: skip
    assert crossed_examples(examples(), 20, seed=0) == found
    assert crossed_examples(examples(), 20, seed=1) != found


def test_no_prompt_is_known_or_longer_than_all() -> None:
    given = examples()
    taken = {example.prompt for example in crossed_examples(given, 10, seed=0)}
    found = {example.prompt for example in crossed_examples(given, 10, seed=0, taken=taken)}
    assert not found & (taken | {example.prompt for example in given})
    assert max(map(len, found)) <= max(len(example.prompt) for example in given)


def test_few_short_prompts_have_few_crossings() -> None:
    assert 0 < len(crossed_examples(examples(("a b", "c d")), 100, seed=0)) < 10
    assert crossed_examples(examples(("a", "a")), 3, seed=0) == []


@pytest.mark.parametrize("form", ["{}", "{} ", "Text: {}", "{}\nLabel:", "\n{}\n\n"])
def test_templates_of_all_forms(form: str) -> None:
    before, after = form.split("{}")
    for example in crossed_examples(examples(form=form), 10, seed=0):
        assert example.prompt.startswith(before)
        assert example.prompt.endswith(after)


def test_choices_that_differ_are_refused(task: Task, dense: PreTrainedModel) -> None:
    given = examples()
    given[1] = replace(given[1], candidates=(" yes", " never"))
    with pytest.raises(ValueError, match=r"`crossed_prompts` must be 0 for tasks that do not have the same labels"):
        crossed_examples(given, 5, seed=0)
    with pytest.raises(ValueError, match="`crossed_prompts` must be at least 0, got -1"):
        SieveConfig(pruning_ratio=0.5, crossed_prompts=-1)


def test_they_count_for_moments_and_healing_alone(task: Task, dense: PreTrainedModel, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"pruning_ratio": 0.5, "rounds": 1, "heal": HealConfig(steps=1)}
    keys = set()
    for count in (0, 30):
        run = prepare(
            copy.deepcopy(dense), TOKENIZER, [task], unhealed(**settings, crossed_prompts=count),
            work_dir=tmp_path / "work", study_storage=None, **QUIET,
        )  # fmt: skip
        (one,) = run.tasks
        assert len(one.unlabelled) == count
        assert len(one.calibration) == task.splits["calibration"]
        assert [len(lesson.examples) for lesson in make_lessons(run)] == [
            len(one.calibration),
            *([count] * bool(count)),
        ]
        keys.add(calibrate(run).key)
    assert len(keys) == 2
    pruner = SievePruner(copy.deepcopy(dense), TOKENIZER, task)
    report = pruner.prune(unhealed(**settings, crossed_prompts=30), **QUIET).report
    assert report["healing"]["examples"] == task.splits["calibration"] + 30
    assert report["settings"]["crossed_prompts"] == 30


def test_prompts_without_a_crossing_add_nothing(dense: PreTrainedModel, tmp_path: Path) -> None:
    words = load_task(tmp_path, parity_rows(90, length=1))
    config = unhealed(pruning_ratio=0.5, crossed_prompts=5)
    run = prepare(copy.deepcopy(dense), TOKENIZER, [words], config, work_dir=None, study_storage=None, **QUIET)
    assert run.tasks[0].unlabelled == ()
