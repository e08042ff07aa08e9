"""Crossed prompts: the beginning of one calibration prompt and the end of another, for healing alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from healed_world import TOKENIZER
from toy import load_task, parity_rows, unhealed

from optimum_sieve import HealConfig, SievePruner
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.healing import lessons
from optimum_sieve.healing.crossing import crossed_examples
from optimum_sieve.healing.lessons import make_lessons
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.tasks import Example


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Task

QUIET: dict[str, Any] = {"progress": False}
TEXTS = ("one two three four", "five six seven", "eight nine ten eleven twelve", "a b c")


def examples(texts: tuple[str, ...] = TEXTS, form: str = "Read: {}\nIs it good?\nAnswer:") -> list[Example]:
    return [Example(prompt=form.format(text), answer=" yes", candidates=(" yes", " no"), target=0) for text in texts]


def test_the_tokens_of_a_chat_template_are_kept() -> None:
    form = "<user>{}<end><assistant>"
    found = crossed_examples(examples(form=form), 20, seed=0, marks=("<user>", "<end>", "<assistant>"))
    assert len(found) == 20
    for example in found:
        body = example.prompt.removeprefix("<user>").removesuffix("<end><assistant>")
        assert form.format(body) == example.prompt
        assert "<" not in body
    # Also in the middle of texts.
    given = examples(tuple(f"{text} <end> <user> {text}" for text in TEXTS), form)
    found = crossed_examples(given, 20, seed=0, marks=("<user>", "<end>", "<assistant>"))
    assert found
    for example in found:
        assert [example.prompt.count(mark) for mark in ("<user>", "<end>", "<assistant>")] == [2, 2, 1]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Fewer rows than the other tests have; their model learns these instead."""
    return load_task(tmp_path_factory.mktemp("task"), parity_rows(180))


def healing_run(dense: PreTrainedModel, task: Task, heal: HealConfig, work: Path | None = None) -> Run:
    """Prepare a run that heals; its model is a copy."""
    config = unhealed(pruning_ratio=0.5, rounds=1, heal=heal)
    return prepare(
        copy.deepcopy(dense), TOKENIZER, [task], config, work_dir=work, study_storage=None, **QUIET
    )  # fmt: skip


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


def test_fields_on_lines_of_their_own_stay_apart() -> None:
    """Each body has one line break, as all parents have; texts of several lines may have any number between."""
    fields = examples(tuple(f"{text}\nQuestion: is {text} so" for text in TEXTS), "Text: {}\nAnswer:")
    found = crossed_examples(fields, 50, seed=0)
    assert found
    for example in found:
        assert example.prompt.count("\nQuestion: ") == 1
    longer = (*TEXTS, "one two \n three \n four five six")
    breaks = {example.prompt.count("\n") - 2 for example in crossed_examples(examples(longer), 100, seed=0)}
    assert breaks == {0, 1, 2}


def test_texts_without_spaces_are_not_crossed() -> None:
    assert crossed_examples(examples(("很好看的电影", "不好", "太长 了")), 10, seed=0) == []


@pytest.mark.parametrize("form", ["{}", "{} ", "Text: {}", "{}\nLabel:", "\n{}\n\n"])
def test_templates_of_all_forms(form: str) -> None:
    before, after = form.split("{}")
    for example in crossed_examples(examples(form=form), 10, seed=0):
        assert example.prompt.startswith(before)
        assert example.prompt.endswith(after)


def test_choices_that_differ_are_not_crossed() -> None:
    given = examples()
    given[1] = replace(given[1], candidates=(" yes", " never"))
    assert crossed_examples(given, 5, seed=0) == []


def test_they_are_learned_in_healing_alone(task: Task, dense: PreTrainedModel, tmp_path: Path) -> None:
    keys = set()
    for count in (0, 30):
        run = healing_run(dense, task, HealConfig(steps=1, crossed_prompts=count), tmp_path / "work")
        (one,) = run.tasks
        made = make_lessons(run)
        assert [len(lesson.examples) for lesson in made] == [len(one.calibration), *([count] * bool(count))]
        assert sum(lesson.weight for lesson in made) == pytest.approx(1)
        keys.add(calibrate(run).key)
    assert len(keys) == 1
    crossed = made[1]
    assert not crossed.gold
    assert crossed.weight == pytest.approx(30 / (30 + len(one.calibration)))
    # Another order, other crossings.
    other = make_lessons(replace(run, config=replace(run.config, seed=1)))
    assert other[1].examples != crossed.examples


def test_they_join_unlabelled_examples(task: Task, dense: PreTrainedModel) -> None:
    run = healing_run(dense, task, HealConfig(crossed_prompts=30))
    more = [replace(example, answer="", target=None) for example in run.tasks[0].test[:7]]
    run = replace(run, tasks=(replace(run.tasks[0], test=(), unlabelled=more),))
    gold, rest = make_lessons(run)
    assert list(rest.examples[:7]) == more
    assert len(rest.examples) == 37
    assert gold.weight + rest.weight == pytest.approx(1)


def test_only_candidates_are_answered_without_gold(task: Task, dense: PreTrainedModel) -> None:
    assert len(make_lessons(healing_run(dense, task, HealConfig(loss="vocabulary")))) == 1


def test_lettered_choices_are_not_crossed(task: Task, dense: PreTrainedModel) -> None:
    """They may all have the same letters."""
    run = healing_run(dense, task, HealConfig())
    assert len(make_lessons(run)) == 2
    assert len(make_lessons(replace(run, tasks=(replace(run.tasks[0], kind="choices"),)))) == 1


def test_no_prompt_has_more_tokens_than_the_longest_example(
    task: Task, dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary has whole words, so a word in pieces has many tokens for its length."""
    run = healing_run(dense, task, HealConfig(crossed_prompts=50))
    (one,) = run.tasks

    def length(example: Example) -> int:
        return len(TOKENIZER(example.prompt)["input_ids"])

    longest = max(map(length, one.calibration))
    made = crossed_examples(one.calibration, 50, seed=0)
    many = replace(made[0], prompt=one.calibration[0].prompt + " 1" * longest)
    monkeypatch.setattr(lessons, "crossed_examples", lambda *arguments, **options: [*made, many])
    _, rest = make_lessons(run)
    assert list(rest.examples) == [example for example in made if length(example) <= longest]
    assert rest.crossed == len(rest.examples) > 40


def test_no_prompt_of_another_split_is_trained_on(task: Task, dense: PreTrainedModel) -> None:
    run = healing_run(dense, task, HealConfig(crossed_prompts=30))
    first = make_lessons(run)[1].examples
    for split in ("selection", "test", "unlabelled"):
        one = replace(run.tasks[0], **{split: [*run.tasks[0].examples(split), replace(first[3], target=0)]})
        lesson = make_lessons(replace(run, tasks=(one,)))[1]
        made = lesson.examples[len(lesson.examples) - lesson.crossed :]
        assert first[3].prompt not in {example.prompt for example in made}, split


def test_prompts_without_a_crossing_add_nothing(dense: PreTrainedModel, tmp_path: Path) -> None:
    words = load_task(tmp_path, parity_rows(90, length=1))
    assert len(make_lessons(healing_run(dense, words, HealConfig()))) == 1


def test_the_report_and_the_card_count_them(task: Task, dense: PreTrainedModel, tmp_path: Path) -> None:
    pruner = SievePruner(copy.deepcopy(dense), TOKENIZER, task)
    heal = HealConfig(steps=1, crossed_prompts=30)
    report = pruner.prune(unhealed(pruning_ratio=0.5, rounds=1, heal=heal), **QUIET).report
    calibration = task.splits["calibration"]
    assert (report["healing"]["examples"], report["healing"]["crossed_prompts"]) == (calibration, 30)
    card = (pruner.save_pretrained(tmp_path / "out") / "README.md").read_text()
    assert f"on {calibration} calibration examples and 30 prompts crossed from them to match" in card


def test_a_number_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`heal\.crossed_prompts` must be at least 0, got -1"):
        HealConfig(crossed_prompts=-1)
