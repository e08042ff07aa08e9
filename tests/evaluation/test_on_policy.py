"""A pruned model writes answers, and the dense one judges them token by token."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from model_kinds import make_model as make_kind
from toy import load_task, make_model, make_tokenizer, parity_rows
from written_world import ANSWER, WRITTEN

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.evaluation import on_policy
from optimum_sieve.evaluation.batches import make_batches
from optimum_sieve.evaluation.generation import write_answers
from optimum_sieve.evaluation.on_policy import lessons_of, write_examples
from optimum_sieve.evaluation.teacher import Lesson, lessons_fingerprint, teach
from optimum_sieve.run.workdir import WorkDir


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.tasks import Example

TOKENIZER = make_tokenizer()
QUIET: dict[str, Any] = {"progress": False}


class Model:
    """A model that takes the weights of the dense one inside a context."""

    def __init__(self, dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
        self.dense, self.model = dense, copy.deepcopy(pruned)
        self.pruned, self.visits = pruned, 0

    @contextmanager
    def as_dense(self) -> Iterator[None]:
        self.visits += 1
        self.model.load_state_dict(self.dense.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(self.pruned.state_dict())


@pytest.fixture
def models() -> Model:
    return Model(make_model(), make_model(1))


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    return list(load_task(tmp_path, parity_rows(40), **WRITTEN | ANSWER).examples("calibration", TOKENIZER))


@pytest.fixture
def gold(models: Model, examples: list[Example]) -> Lesson:
    return Lesson(teacher=teach(models.dense, examples, TOKENIZER, **QUIET), examples=examples, weight=0.3)


def lessons(gold: Lesson, models: Model, **options: Any) -> list[Lesson]:
    return lessons_of(gold, models.model, TOKENIZER, as_dense=models.as_dense, **QUIET | options)


def test_the_dense_model_judges_what_the_pruned_one_writes(gold: Lesson, models: Model) -> None:
    first, second = lessons(gold, models, written_share=0.25, prompt_sites=3, prompt_weight=0.5)
    assert (first.teacher, first.examples, first.gold, second.gold) == (gold.teacher, gold.examples, True, False)
    assert (first.weight, second.weight) == pytest.approx((0.225, 0.075))
    texts = [one.text for one in write_answers(models.pruned, gold.examples, TOKENIZER, batch_size=8)]
    assert [example.accepted for example in second.examples] == [(text,) for text in texts]
    assert texts != [example.accepted[0] for example in gold.examples]
    options: dict[str, Any] = {"prompt_sites": 3, "prompt_weight": 0.5, "beta": 0.5, **QUIET}
    expected, other = (teach(model, second.examples, TOKENIZER, **options) for model in (models.dense, models.pruned))
    torch.testing.assert_close(second.teacher.log_probs, expected.log_probs)
    assert not torch.allclose(second.teacher.log_probs, other.log_probs, atol=0.1)
    assert second.teacher.fingerprint == expected.fingerprint
    for name, parameter in models.model.state_dict().items():
        assert torch.equal(parameter, models.pruned.state_dict()[name])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_share_alone_is_one_lesson(share: float, gold: Lesson, models: Model) -> None:
    (lesson,) = lessons(gold, models, written_share=share)
    assert (lesson.gold, lesson.weight, models.visits) == (share == 0.0, 0.3, int(share))


def test_tasks_of_labels_have_no_written_answers(models: Model, tmp_path: Path) -> None:
    examples = list(load_task(tmp_path).examples("calibration", TOKENIZER))
    gold = Lesson(teacher=teach(models.dense, examples, TOKENIZER, **QUIET), examples=examples)
    assert lessons(gold, models) == [gold]
    assert models.visits == 0


def test_some_of_the_prompts_are_answered_by_another_choice_for_another_seed(gold: Lesson, models: Model) -> None:
    prompts = [example.prompt for example in gold.examples]
    chosen = [
        [prompts.index(example.prompt) for example in lessons(gold, models, max_examples=5, seed=seed)[1].examples]
        for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] == sorted(set(chosen[0]))
    assert len(chosen[0]) == 5
    assert chosen[2] != chosen[0]


def test_answers_are_drawn_by_seed(gold: Lesson, models: Model) -> None:
    def texts(**options: Any) -> list[tuple[str, ...]]:
        return [example.accepted for example in lessons(gold, models, **options)[1].examples]

    assert texts(sampled=True) == texts(sampled=True, batch_size=3)
    assert texts(sampled=True) != texts(sampled=True, seed=1)
    assert texts(seed=1) == texts()


def test_a_stopped_run_gets_the_answers_it_had(
    gold: Lesson, models: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"work": WorkDir(tmp_path / "work"), "pruned_key": "a", "model_key": "dense"}
    first = lessons(gold, models, **options)
    with monkeypatch.context() as patched:
        patched.setattr(on_policy, "label_by_model", None)
        patched.setattr(type(models.model), "forward", None)
        assert lessons_fingerprint(lessons(gold, models, **options)) == lessons_fingerprint(first)
    models.model = copy.deepcopy(models.dense)
    other = lessons(gold, models, **options | {"pruned_key": "b"})
    assert [example.answer for example in other[1].examples] != [example.answer for example in first[1].examples]
    assert lessons_fingerprint(other) != lessons_fingerprint(first)


def test_answers_that_were_cut_have_no_end(examples: list[Example], models: Model) -> None:
    written = write_answers(models.pruned, examples, TOKENIZER, batch_size=8)
    found = write_examples(models.pruned, examples, TOKENIZER, **QUIET)
    assert {one.ended for one in written} == {True, False}
    assert [example.answer.endswith("</s>") for example in found] == [one.ended for one in written]


def silent() -> PreTrainedModel:
    """Make a model that writes the unknown token, which is not shown, whatever it reads."""
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


def test_empty_answers_are_their_end_if_there_is_one(gold: Lesson, models: Model, examples: list[Example]) -> None:
    assert {example.answer for example in write_examples(silent(), examples, TOKENIZER, **QUIET)} == {"</s>"}
    endless = make_tokenizer()
    endless.eos_token = None
    assert write_examples(silent(), examples, endless, **QUIET) == []
    models.model = silent()
    found = lessons_of(gold, models.model, endless, as_dense=models.as_dense, **QUIET)
    assert (found, models.visits) == ([gold], 0)


def test_an_encoder_decoder_writes_as_well(examples: list[Example]) -> None:
    models = Model(make_kind("t5"), make_kind("t5"))
    with torch.no_grad():
        models.pruned.lm_head.weight.copy_(models.pruned.lm_head.weight.flip(0))
    models.model.load_state_dict(models.pruned.state_dict())
    gold = Lesson(teacher=teach(models.dense, examples, TOKENIZER, **QUIET), examples=examples)
    lesson = lessons(gold, models, prompt_sites=4)[1]
    texts = [one.text for one in write_answers(models.pruned, examples, TOKENIZER, batch_size=8)]
    assert [example.accepted for example in lesson.examples] == [(text,) for text in texts]
    inputs = input_format(models.model)
    (batch,) = make_batches(lesson.examples, TOKENIZER, batch_size=64, candidates=False, inputs=inputs)
    with torch.no_grad():
        assert float(lesson.losses(models.model, batch, 0.5).min()) > 0
        torch.testing.assert_close(
            lesson.losses(models.dense, batch, 0.5), torch.zeros(len(examples)), atol=1e-5, rtol=0
        )


def test_answers_that_no_longer_fit_are_left_out(
    examples: list[Example], models: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Written text may have more tokens than were written.
    def longer(model: Any, examples: list[Example], *unused: Any, **options: Any) -> list[Example]:
        answers = [" odd" * (70 if number % 2 else 3) for number in range(len(examples))]
        return [replace(e, answer=a, accepted=(a,)) for e, a in zip(examples, answers, strict=True)]

    monkeypatch.setattr(on_policy, "label_by_model", longer)
    found = write_examples(models.pruned, examples, TOKENIZER, **QUIET)
    assert [example.prompt for example in found] == [example.prompt for example in examples[::2]]


def test_training_on_the_lessons_brings_the_model_to_the_dense_one(gold: Lesson, models: Model) -> None:
    parts = lessons(gold, models, prompt_sites=4)
    batches = [
        (lesson, batch)
        for lesson in parts
        for batch in make_batches(lesson.examples, TOKENIZER, batch_size=64, candidates=False)
    ]
    optimizer = torch.optim.Adam(models.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        step = [lesson.losses(models.model, batch, 0.0).mean() for lesson, batch in batches]
        losses.append([float(loss.detach()) for loss in step])
        optimizer.zero_grad()
        torch.stack(step).sum().backward()
        optimizer.step()
    assert all(last < 0.5 * first for first, last in zip(losses[0], losses[-1], strict=True))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"written_share": -0.1}, "`written_share` must be between 0 and 1, got -0.1"),
        ({"written_share": float("nan")}, "`written_share` must be between 0 and 1, got nan"),
        ({"max_examples": 0}, "`max_examples` must be at least 1, got 0"),
        ({"beta": -1.0}, "`beta` must be between 0 and 1, got -1.0"),
        ({"prompt_sites": -2}, "`prompt_sites` must be at least 0, got -2"),
    ],
)
def test_settings_out_of_range_are_refused_before_any_answer(
    setting: dict[str, Any], message: str, gold: Lesson, models: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_policy, "label_by_model", None)
    with pytest.raises(ValueError, match=message):
        lessons(gold, models, **setting)
