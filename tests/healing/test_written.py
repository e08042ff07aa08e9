"""Models that write answers are healed on those they write themselves, as they are before each size."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from toy import load_task, make_model, make_tokenizer, parity_rows
from written_world import ANSWER, WRITTEN

from optimum_sieve import HealConfig, SieveConfig
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.evaluation import on_policy
from optimum_sieve.evaluation.generation import write_answers
from optimum_sieve.evaluation.teacher import teach
from optimum_sieve.healing import stage
from optimum_sieve.healing.stage import Healer
from optimum_sieve.pipeline.prepare import prepare


if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from transformers import PreTrainedModel

    from optimum_sieve.evaluation.teacher import Lesson

TOKENIZER = make_tokenizer()
SIZES = (0.8, 0.6)


class Seen:
    """The lessons and the model of each healing, before it."""

    def __init__(self) -> None:
        self.lessons: list[list[Lesson]] = []
        self.models: list[PreTrainedModel] = []


def descend(directory: Path, monkeypatch: pytest.MonkeyPatch, work: Path | None = None, **settings: Any) -> Seen:
    """Heal two sizes of a random model on a task of written answers with 40 calibration rows."""
    task = load_task(directory, parity_rows(100), **WRITTEN | ANSWER)
    config = SieveConfig(
        tolerance=0.5, rank_multiple=1, rounds=1, heal=HealConfig(**{"steps": 4, "batch_size": 4, **settings})
    )
    run = prepare(make_model(), TOKENIZER, [task], config, work_dir=work, study_storage=None, progress=False)
    seen, heal = Seen(), stage.heal

    def watching(model: Any, lessons: Any, *args: Any, **options: Any) -> Any:
        seen.models.append(copy.deepcopy(model))
        seen.lessons.append(lessons)
        return heal(model, lessons, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(stage, "heal", watching)
        Healer(run).descend(calibrate(run), SIZES, lambda size: True)
    return seen


def test_each_size_is_healed_on_what_its_model_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = descend(tmp_path, monkeypatch, prompt_sites=3)
    assert len(seen.lessons) == len(SIZES)
    for model, (gold, written) in zip(seen.models, seen.lessons, strict=True):
        assert (gold.gold, gold.weight, written.gold, written.weight) == (True, 0.5, False, 0.5)
        # As many as the steps draw of them.
        assert len(written.examples) == 8 < len(gold.examples)
        texts = write_answers(model, written.examples, TOKENIZER, batch_size=8)
        assert [example.accepted for example in written.examples] == [(answer.text,) for answer in texts]
        expected = teach(make_model(), written.examples, TOKENIZER, progress=False)
        rows = [row for index in range(8) for row in range(*written.teacher.starts[2 * index : 2 * index + 2].tolist())]
        torch.testing.assert_close(written.teacher.log_probs[rows], expected.log_probs, rtol=1e-3, atol=1e-4)
        assert len(written.teacher.rest) > len(rows)
    first, second = ([example.prompt for example in lessons[1].examples] for lessons in seen.lessons)
    assert first != second


def test_without_a_share_there_is_the_gold_lesson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_policy, "label_by_model", None)
    for lessons in descend(tmp_path, monkeypatch, written_share=0.0).lessons:
        assert [(lesson.gold, lesson.weight) for lesson in lessons] == [(True, 1.0)]


def test_a_second_run_writes_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = descend(tmp_path, monkeypatch, work=tmp_path / "work")
    monkeypatch.setattr(on_policy, "label_by_model", None)
    second = descend(tmp_path, monkeypatch, work=tmp_path / "work")
    for one, other in zip(first.lessons, second.lessons, strict=True):
        assert [lesson.teacher.fingerprint for lesson in one] == [lesson.teacher.fingerprint for lesson in other]
