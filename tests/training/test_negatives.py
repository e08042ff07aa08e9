"""Training on some of an example's many candidates: which are drawn, and what tuning and healing make of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed

from optimum_sieve import HealConfig, Task, TuneConfig
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.evaluation.scores import evaluate
from optimum_sieve.evaluation.teacher import CandidateTeacher
from optimum_sieve.healing.lessons import among, make_lessons, training_examples
from optimum_sieve.pipeline.planning import plan_run
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.tasks import Example
from optimum_sieve.training.loop import Trainer
from optimum_sieve.training.negatives import COPIES, drawn_copies, has_many_candidates
from optimum_sieve.training.sampling import drawn_examples
from optimum_sieve.tuning.loop import train


if TYPE_CHECKING:
    from pathlib import Path

    from optimum_sieve.run.context import Run

MANY = 40


def example(count: int = MANY, **changes: Any) -> Example:
    texts = tuple(f" {number}" for number in range(count))
    return Example(**{"prompt": "Number:", "answer": texts[0], "candidates": texts, "target": 3, **changes})


def many_task(directory: Path, *, end: str = " very") -> Task:
    """Return a task with `MANY` labels of two tokens, or of one token without an `end`. Only two labels occur."""
    rows = [{**row, "label": "7" if row["label"] == "even" else "30"} for row in parity_rows(300)]
    return load_task(directory, rows, labels={str(number): f" {number}{end}" for number in range(MANY)})


def make_run(task: Task, **settings: Any) -> Run:
    config = unhealed(pruning_ratio=0.5, **settings)
    return prepare(
        make_model(), make_tokenizer(), [task], config, work_dir=None, study_storage=None, progress=False
    )  # fmt: skip


def test_the_gold_one_and_random_others_are_drawn() -> None:
    counts, copies = np.zeros(MANY), 2000
    for fewer, chosen in zip(*drawn_copies([example()], 5, copies, seed=0), strict=True):
        assert chosen == sorted(set(chosen))
        assert fewer.candidates == tuple(f" {number}" for number in chosen)
        assert fewer.target is not None
        assert fewer.candidates[fewer.target] == " 3"
        counts[chosen] += 1
    assert counts[3] == copies
    others = np.delete(counts, 3) / copies
    np.testing.assert_allclose(others, 4 / (MANY - 1), atol=0.03)


def test_without_a_gold_one_all_are_drawn() -> None:
    chosen = drawn_copies([example(target=None)], 5, 2000, seed=0)[1]
    assert {len(each) for each in chosen} == {5}
    assert np.mean([3 in each for each in chosen]) == pytest.approx(5 / MANY, abs=0.03)


def test_half_of_the_weight_is_the_models() -> None:
    log_probs = np.full((1, MANY), -np.inf)
    log_probs[0, [9, 20]] = np.log([0.75, 0.25])
    chosen = drawn_copies([example()], 2, 4000, seed=0, log_probs=log_probs)[1]
    found = np.bincount([number for each in chosen for number in each if number != 3], minlength=MANY) / 4000
    # The gold one has a share of neither half.
    uniform = 1 / MANY
    total = 2 - uniform
    np.testing.assert_allclose(
        found[[9, 20, 0]], np.array([0.75 + uniform, 0.25 + uniform, uniform]) / total, atol=0.03
    )


def test_draws_depend_on_seed_example_and_copy_alone() -> None:
    first, second = example(), example(prompt="Another:")
    many = drawn_copies([first, second], 5, 3, seed=0)[1]
    assert len({tuple(each) for each in many}) == 6
    assert drawn_copies([first], 5, 1, seed=0)[1] == many[:1]
    assert drawn_copies([first, second], 5, 3, seed=1)[1] != many


def test_few_candidates_stay_as_they_are() -> None:
    few, many = example(4, normalized=True), example(normalized=tuple(range(1, MANY + 1)))
    fewer, chosen = drawn_copies([few, many], 5, 2, seed=0)
    assert fewer[0] == fewer[2] == few
    assert fewer[1].normalized == tuple(number + 1 for number in chosen[1])


def test_epochs_take_the_copies_in_turn() -> None:
    drawn = drawn_examples(range(30), [4] * 10, 3, seed=1, copies=2)
    for epoch in range(6):
        first = 5 * (epoch % 2)
        assert sorted(drawn[5 * epoch : 5 * epoch + 5]) == list(range(first, first + 5))


def test_the_teacher_is_asked_which_of_the_drawn_ones_it_is() -> None:
    log_probs = torch.randn(2, MANY).log_softmax(dim=-1)
    teacher = CandidateTeacher("all", torch.tensor([3, 3]), log_probs)
    over = among(teacher, [[1, 3, 5], [3, 8], [2, 3, 4], [0, 3, 7]], [1, 0, 1, 1])
    for row, (number, chosen) in enumerate([(0, [1, 3, 5]), (1, [3, 8]), (0, [2, 3, 4]), (1, [0, 3, 7])]):
        expected = log_probs[number, chosen].exp() / log_probs[number, chosen].exp().sum()
        torch.testing.assert_close(over.log_probs[row, : len(chosen)].exp(), expected)
    assert over.log_probs[1, 2] == -torch.inf
    assert over.targets.tolist() == [1, 0, 1, 1]
    assert len({teacher.fingerprint, over.fingerprint, among(teacher, [[1, 3]], [1]).fingerprint}) == 3


@pytest.mark.parametrize(
    ("end", "most", "many"), [(" very", 16, True), ("", 16, False), (" very", 40, False), (" very", 0, False)]
)
def test_candidates_of_one_token_are_never_many(end: str, most: int, many: bool, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    examples = many_task(tmp_path, end=end).examples("calibration", tokenizer)
    assert has_many_candidates(examples, most, tokenizer, input_format(make_model())) is many


def widths(run: Run, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Return how many candidates the examples have that tuning trains on."""
    seen: set[int] = set()
    passes = Trainer._passes

    def noted(trainer: Trainer) -> Any:
        found = passes(trainer)
        seen.update(int(count) for _, batch in found for count in batch.present.sum(dim=1))
        return found

    monkeypatch.setattr(Trainer, "_passes", noted)
    train(run)
    monkeypatch.undo()
    return seen


def test_tuning_sees_some_candidates_and_learns_among_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = many_task(tmp_path)
    assert widths(make_run(task, tune=TuneConfig(steps=2, max_candidates=0)), monkeypatch) == {MANY}
    tune = TuneConfig(steps=60, learning_rate=2e-2)
    assert widths(make_run(task, tune=TuneConfig(steps=2)), monkeypatch) == {16}
    run = make_run(task, tune=tune)

    def score() -> float:
        options: dict[str, Any] = {"metric": "accuracy", "batch_size": 16, "progress": False}
        return evaluate(run.model, run.tasks[0].test, run.tokenizer, **options).score

    assert score() < 0.1
    adapters, training, _ = train(run)
    assert training.examples == len(run.tasks[0].calibration)
    adapters.merge()
    # It has learned which two labels occur, and guesses between them.
    assert score() > 0.4


def test_lessons_are_over_some_candidates(tmp_path: Path) -> None:
    task = many_task(tmp_path)
    heal = HealConfig(crossed_prompts=8)
    run = make_run(task, heal=heal)
    lessons, whole = (
        make_lessons(run),
        make_lessons(make_run(task, heal=HealConfig(crossed_prompts=8, max_candidates=0))),
    )
    count = len(run.tasks[0].calibration)
    assert training_examples(lessons) == {"examples": count, "crossed_prompts": 2}
    assert training_examples(whole) == {"examples": count, "crossed_prompts": 8}
    for lesson, all_of_it in zip(lessons, whole, strict=True):
        assert (lesson.copies, all_of_it.copies) == (COPIES, 1)
        assert {len(each.candidates) for each in lesson.examples} == {16}
        assert {len(each.candidates) for each in all_of_it.examples} == {MANY}
    gold, crossed = lessons
    assert all(each.candidates[each.target or 0].strip() == each.answer.strip() for each in gold.examples)
    assert {each.target for each in crossed.examples} == {None}


def test_a_plan_counts_what_is_drawn(tmp_path: Path) -> None:
    task, trained = many_task(tmp_path), {}
    for most in (0, 16):
        run = make_run(task, heal=HealConfig(max_candidates=most), tune=TuneConfig(max_candidates=most))
        plan = plan_run(run.model, run.tokenizer, [task], run.targets, None, run.config)
        assert plan.work is not None
        trained[most] = plan.work.stages
    for stage in ("tuning", "healing"):
        assert 0.2 < trained[16][stage] / trained[0][stage] < 0.9
    assert trained[16]["test"] == trained[0]["test"]
