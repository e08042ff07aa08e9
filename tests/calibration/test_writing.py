"""Prompts that the dense model writes where a task has few: what is read from its texts, and who uses them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from healed_world import TOKENIZER
from toy import load_task, make_model, make_tokenizer, parity_rows, prompts, unhealed

from optimum_sieve import HealConfig, SieveConfig, SievePruner
from optimum_sieve.calibration import writing
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.calibration.writing import prompts_key, prompts_to_write, with_written_prompts, write_prompts
from optimum_sieve.evaluation.generation import Written, write_answers
from optimum_sieve.healing.lessons import make_lessons
from optimum_sieve.pipeline.planning import plan_run
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.tasks import Example
from optimum_sieve.tasks.example import Generation


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Task

# As it is outside the tests.
FEW_PROMPTS = writing.FEW_PROMPTS
TEXTS = ("1 2 3 4", "5 6 7", "8 9 0 1 2", "3 4 5")


def examples(texts: Sequence[str] = TEXTS, form: str = "Read {} .") -> list[Example]:
    return [Example(prompt=form.format(text), answer=" odd", candidates=(" odd", " even"), target=0) for text in texts]


class Script:
    """Stands in for the model: each call writes the next of some texts in its first row, and nothing in the others."""

    def __init__(self, *texts: str, ended: bool = True) -> None:
        self.texts, self.ended, self.seen = list(texts), ended, list[list[Example]]()

    def __call__(self, model: object, rows: list[Example], tokenizer: object, **options: Any) -> list[Written]:
        self.seen.append(rows)
        text = self.texts.pop(0) if self.texts else ""
        return [Written(text, ended=self.ended), *(Written("", ended=True) for _ in rows[1:])]


def read(monkeypatch: pytest.MonkeyPatch, script: Script, given: list[Example] | None = None, **options: Any) -> Any:
    monkeypatch.setattr(writing, "write_answers", script)
    options = {"progress": False, "batch_size": 2, **options}
    tokenizer = options.pop("tokenizer", TOKENIZER)
    model = make_model(vocab_size=len(tokenizer))
    return write_prompts(model, given or examples(), tokenizer, options.pop("count", 10), **options)


def test_the_instruction_stays_and_the_texts_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script("4 4 4\n\n5 6 7\n\n4  4 4\n\n9 9 9 9\n\n")
    assert read(monkeypatch, script, taken=["Read 9 9 9 9 ."]) == ["Read 4 4 4 ."]


def test_the_model_sees_the_texts_one_below_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    read(monkeypatch, script)
    for row in script.seen[0]:
        assert row.prompt.endswith("\n\n")
        assert sorted(row.prompt.split("\n\n")) == sorted(["", *TEXTS])
        assert (row.candidates, row.generation.scored) == ((), "text as written")


def test_a_text_without_its_end_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, Script("4 4 4\n\n6 6 6", ended=False)) == ["Read 4 4 4 ."]
    assert read(monkeypatch, Script("4 4 4\n\n6 6 6", ended=True)) == ["Read 4 4 4 .", "Read 6 6 6 ."]


def test_texts_of_another_length_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, Script("1 1\n\n1 1 1\n\n1 1 1 1 1\n\n1 1 1 1 1 1\n\n")) == [
        "Read 1 1 1 .",
        "Read 1 1 1 1 1 .",
    ]


def test_lines_keep_their_number_and_their_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    given = examples(("1 2 3\nSo: 4", "3 4 5\nSo: 6"))
    script = Script("2 2 2\nSo: 2\n\n2 2 2 2 2\n\n2 2 2\nAs: 2\n\n1 2 3\nSo: 5\n\n")
    assert read(monkeypatch, script, given) == ["Read 2 2 2\nSo: 2 .", "Read 1 2 3\nSo: 5 ."]


def test_texts_with_empty_lines_are_separated_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    given = examples(("1 2\n\n3", "4 5\n\n6"))
    script = Script("7 8\n\n9\n\n###\n\n")
    assert read(monkeypatch, script, given) == ["Read 7 8\n\n9 ."]
    assert script.seen[0][0].prompt.count("###") == 2


def test_it_ends_with_the_wanted_number_or_when_little_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    many = "\n\n".join(f"{a} {b} {a}" for a in range(10) for b in range(10)) + "\n\n"
    assert len(read(monkeypatch, Script(many), count=7)) == 7
    script = Script(*["4 4 4\n\n"] * 100)
    assert read(monkeypatch, script, count=16) == ["Read 4 4 4 ."]
    # 16 prompts take one round of rows with eight prompts each.
    assert len(script.seen) == 4


CHAT = "<|im_start|>user\nRead {}<|im_end|>\n<|im_start|>assistant\n"


def chat_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def test_the_tokens_of_a_chat_template_stay_around_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script("4 4 4\n\n")
    given = [replace(example, add_special_tokens=False) for example in examples(form=CHAT)]
    assert read(monkeypatch, script, given, tokenizer=chat_tokenizer()) == [CHAT.format("4 4 4")]
    for row in script.seen[0]:
        assert "<|" not in row.prompt
        # The template adds BOS, which a row without it gets from the tokenizer.
        assert row.add_special_tokens


def test_a_text_with_tokens_of_the_template_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    # Not special: `decode` keeps them.
    tokenizer.add_tokens(["<|user|>", "<|end|>", "covid"])
    tokenizer.chat_template = "<|user|>{{ messages[0].content }}<|end|>"
    form = "<|user|>Read {}<|end|>"
    script = Script("4 <|end|> 4\n\n4 4 4\n\n4 4 <|user|>\n\n4 covid 4\n\n")
    assert read(monkeypatch, script, examples(form=form), tokenizer=tokenizer) == [
        form.format("4 4 4"),
        form.format("4 covid 4"),
    ]
    # Words that were added are text.
    given = examples([f"{n} covid {n}" for n in range(4)], form)
    assert read(monkeypatch, Script("4 covid 5\n\n"), given, tokenizer=tokenizer) == [form.format("4 covid 5")]


def test_texts_in_two_messages_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script("4 4 4\n\n")
    given = examples([f"{n}<|im_end|>\n<|im_start|>user\n{n + 1}" for n in range(6)], CHAT)
    assert read(monkeypatch, script, given, tokenizer=chat_tokenizer()) == []
    assert script.seen == []


@pytest.mark.parametrize("texts", [["1 2 3"], ["1 2 3"] * 5, ["", " ", "1 2"]])
def test_one_text_alone_is_no_style(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    script = Script("4 4 4\n\n")
    assert read(monkeypatch, script, examples(texts)) == []
    assert script.seen == []


def test_empty_texts_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    read(monkeypatch, script, examples(["", *TEXTS, ""]))
    assert {row.prompt.count("\n\n") for row in script.seen[0]} == {len(TEXTS)}


def test_the_batch_size_does_not_decide_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(batch_size: int) -> list[list[str]]:
        script = Script()
        read(monkeypatch, script, batch_size=batch_size)
        return [[row.prompt for row in rows] for rows in script.seen]

    assert shown(1) == shown(64) != []


def test_long_texts_are_not_shown_together(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    # The model takes 64 tokens: 32 are shown, and as many written.
    read(monkeypatch, script, examples([f" {n}" * 20 for n in range(6)]))
    assert {row.prompt.count("\n\n") for row in script.seen[0]} == {1}
    script = Script()
    assert read(monkeypatch, script, examples([f"{n}" + " 1" * 40 + f" {n}" for n in range(6)])) == []
    assert script.seen == []


def test_few_prompts_get_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "FEW_PROMPTS", FEW_PROMPTS)
    config = SieveConfig(tolerance=0.02)
    assert [prompts_to_write(config, count) for count in (32, 199, 200, 2000)] == [480, 313, 0, 0]
    assert prompts_to_write(SieveConfig(tolerance=0.02, written_prompts=7), 2000) == 7
    assert prompts_to_write(SieveConfig(tolerance=0.02, written_prompts=0), 3) == 0
    # Weights alone are factored, and nothing is trained.
    unread = {"tolerance": 0.02, "projection": "svd", "heal": None}
    assert prompts_to_write(SieveConfig(**unread), 3) == 0
    assert prompts_to_write(SieveConfig(**{**unread, "heal": HealConfig()}), 3) > 0
    assert prompts_to_write(SieveConfig(**{**unread, "projection": "joint"}), 3) > 0
    with pytest.raises(ValueError, match="`written_prompts` must be at least 0, got -1"):
        SieveConfig(tolerance=0.02, written_prompts=-1)


def test_unlikely_tokens_are_not_sampled() -> None:
    model = make_model()
    rows = [Example(prompt="1 2 3", answer="", generation=Generation(max_new_tokens=8, scored="text as written"))] * 3
    options: dict[str, Any] = {"batch_size": 3, "to_score": False}
    greedy = write_answers(model, rows, TOKENIZER, **options)
    assert write_answers(model, rows, TOKENIZER, seed=1, top_p=1e-6, **options) == greedy
    assert write_answers(model, rows, TOKENIZER, seed=1, **options) != greedy


# Runs.


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return load_task(tmp_path, parity_rows(90))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A model that writes twelve new prompts of the task's form."""
    found = Script("\n\n".join(f"{n % 10} {n % 7} {n % 3} {n % 10} {n % 9}"[:5] for n in range(12)) + "\n\n")
    monkeypatch.setattr(writing, "write_answers", found)
    return found


def make_run(task: Task, work_dir: Path | None = None, **settings: Any) -> Run:
    config = unhealed(**{"pruning_ratio": 0.5, "rounds": 1, "written_prompts": 8, **settings})
    return prepare(make_model(), TOKENIZER, [task], config, work_dir=work_dir, study_storage=None, progress=False)


def test_they_serve_as_unlabelled_examples(task: Task, script: Script) -> None:
    (before,) = make_run(task).tasks
    run = with_written_prompts(make_run(task))
    (after,) = run.tasks
    assert 0 < len(after.unlabelled) == after.written <= 8
    assert (before.written, before.given, after.given) == (0, None, before)
    for example in after.unlabelled:
        assert (example.answer, example.target, example.candidates) == ("", None, before.calibration[0].candidates)
    known = {prompt for split in ("calibration", "selection", "test") for prompt in prompts(task, split)}
    assert not known & {example.prompt for example in after.unlabelled}
    assert after.fingerprints != before.fingerprints
    for split in ("calibration", "selection", "test"):
        assert after.examples(split) == before.examples(split)
        assert after.fingerprints[split] == before.fingerprints[split]
    assert calibrate(run).key != calibrate(make_run(task)).key


def test_healing_learns_what_the_dense_model_says_about_them(task: Task, script: Script) -> None:
    run = with_written_prompts(make_run(task, heal=HealConfig(crossed_prompts=0)))
    lessons = make_lessons(run)
    assert [lesson.gold for lesson in lessons] == [True, False]
    assert lessons[1].examples == run.tasks[0].unlabelled


def test_a_second_run_takes_them_from_the_work_directory(task: Task, script: Script, tmp_path: Path) -> None:
    first = with_written_prompts(make_run(task, tmp_path / "work"))
    calls = len(script.seen)
    second = with_written_prompts(make_run(task, tmp_path / "work"))
    assert second.tasks[0].unlabelled == first.tasks[0].unlabelled != []
    assert len(script.seen) == calls
    with_written_prompts(make_run(task, tmp_path / "work", seed=1))
    assert len(script.seen) > calls


@pytest.mark.parametrize("count", [0, None])
def test_nothing_is_written_for_many_prompts_or_if_not_wanted(
    task: Task, script: Script, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "FEW_PROMPTS", 10)
    run = make_run(task, written_prompts=count)
    assert with_written_prompts(run).tasks == run.tasks
    assert script.seen == []


def test_rows_with_choices_of_their_own_get_none(
    tmp_path: Path, script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": str(n), "options": [f"{n}", f"{n + 1}"], "label": n % 2} for n in range(90)]
    task = load_task(tmp_path, rows, labels=None, kind="choices", choices="{{ options }}", candidate=" {{ choice }}")
    assert with_written_prompts(make_run(task)).tasks[0].unlabelled == ()
    assert script.seen == []
    assert "`written_prompts=8` has no effect on 'parity'" in caplog.text


def test_a_warning_says_that_few_were_written(
    task: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writing, "write_answers", Script())
    run = make_run(task)
    assert with_written_prompts(run).tasks == run.tasks
    assert "wrote only 0 of 8 prompts" in caplog.text
    assert "`unlabelled`" in caplog.text


def test_the_report_counts_them(task: Task, script: Script) -> None:
    pruner = SievePruner(make_model(), TOKENIZER, task)
    config = unhealed(pruning_ratio=0.5, rank_multiple=1, written_prompts=4)
    assert pruner.prune(config, progress=False).report["written_prompts"] == 4
    pruner = SievePruner(make_model(), TOKENIZER, task)
    assert "written_prompts" not in pruner.prune(replace(config, written_prompts=0), progress=False).report


def test_a_plan_counts_them(task: Task) -> None:
    def plan(count: int) -> Any:
        run = make_run(task, written_prompts=count)
        return plan_run(run.model, TOKENIZER, [task], run.targets, None, run.config)

    assert ", written 300\n" in plan(300).format()
    assert "written" not in plan(0).format()
    none, some = plan(0).work, plan(300).work
    assert some.stages["examples"] > 0
    assert "examples" not in none.stages
    assert some.passes > 2 * none.passes


def test_a_plan_counts_none_where_none_can_be_written(tmp_path: Path) -> None:
    rows = [{**row, "text": f"{row['text']} <s> {row['text']}"} for row in parity_rows(90)]
    task = load_task(tmp_path, rows)
    run = make_run(task, written_prompts=300)
    assert "written" not in plan_run(run.model, TOKENIZER, [task], run.targets, None, run.config).format()
    assert prompts_key(run, run.tasks[0]) is None
