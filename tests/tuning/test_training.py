"""The training: every kind of model and task learns, resumes to the same weights, and leaves nothing after an error."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import model_kinds
import pytest
import torch
from healed_world import TOKENIZER, assert_same, learn, score, weights
from tiny_models import make_tiny_model
from toy import VOCABULARY, load_task, make_model, parity_rows, unhealed
from two_tasks import SIZE, make_tasks
from written_world import ANSWER, WRITTEN

from optimum_sieve import TuneConfig
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.evaluation.batches import make_batches
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.training.loop import Trainer
from optimum_sieve.training.sampling import interleaved
from optimum_sieve.training.steps import SAVE_STEPS
from optimum_sieve.tuning import loop
from optimum_sieve.tuning.loop import mean_token_loss, train


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Task

QUICK = TuneConfig(steps=40, learning_rate=2e-2)


def make_run(
    model: PreTrainedModel, *tasks: Task, tune: TuneConfig = QUICK, work_dir: Path | None = None, **settings: Any
) -> Run:
    config = unhealed(pruning_ratio=0.5, tune=tune, **settings)
    return prepare(model, TOKENIZER, list(tasks), config, work_dir=work_dir, study_storage=None, progress=False)


def tuned(run: Run) -> dict[str, torch.Tensor]:
    """Train and merge; return the weights."""
    train(run)[0].merge()
    return weights(run.model)


def test_the_model_learns_the_answers(dense: PreTrainedModel, task: Task) -> None:
    model = copy.deepcopy(dense)
    assert score(model, task).score < 0.2
    before = weights(model)
    adapters, training, _ = train(make_run(model, task))
    assert_same(weights(model), before)
    assert (training.steps, training.examples, len(training.losses)) == (40, 300, 3)
    assert training.losses[-1] < 0.3 < 2 < training.losses[0]
    adapters.merge()
    assert score(model, task).score > 0.9
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    # Every linear of the blocks and nothing else.
    assert changed == {name for name in before if name.endswith("_proj.weight")}


def test_the_targets_alone_are_tuned(dense: PreTrainedModel, task: Task) -> None:
    model = copy.deepcopy(dense)
    before = weights(model)
    after = tuned(make_run(model, task, target_modules=("q_proj",), exclude_modules=("layers.0.*",)))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.layers.1.self_attn.q_proj.weight"}


@pytest.mark.parametrize("kind", [*model_kinds.MODELS, "gpt2"])
def test_every_kind_of_model_learns(kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": len(VOCABULARY)}
    model = make_tiny_model("gpt2", **sizes) if kind == "gpt2" else model_kinds.make_model(kind)
    labels = {"labels": {"odd": "odd", "even": "even"}} if input_format(model).kind == "classification" else {}
    task = load_task(tmp_path, parity_rows(100), **labels)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    tune = TuneConfig(steps=48, learning_rate=2e-2, gradient_checkpointing=kind in ("t5", "gpt2"))
    adapters, training, _ = train(make_run(model, task, tune=tune))
    assert training.losses[-1] < 0.9 * training.losses[0]
    # Attention of a decoder to its only token depends on no query or key.
    untrained = [name for name, value in adapters.values().items() if not value.any()]
    assert all(re.fullmatch(r"(model\.)?decoder\..*\.(self_attn|SelfAttention)\.[qk](_proj)?\.left", name)
               for name in untrained)  # fmt: skip
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_written_answers_count_by_their_tokens(tmp_path: Path) -> None:
    answer = "{{ label if label == 'odd' else 'very very even' }}"
    model, task = make_model(), load_task(tmp_path, parity_rows(20), **WRITTEN, answer=answer)
    examples = list(task.examples("calibration", TOKENIZER))
    lengths = [len(TOKENIZER(example.answer)["input_ids"]) for example in examples]
    # With the end of the text.
    assert set(lengths) == {2, 4}
    expected = 0.0
    with torch.no_grad():
        for example, length in zip(examples, lengths, strict=True):
            ids = TOKENIZER(example.prompt + example.answer, return_tensors="pt")["input_ids"]
            log_probs = model(ids).logits[0, -length - 1 : -1].log_softmax(-1)
            expected -= float(log_probs.gather(1, ids[0, -length:, None]).mean())
        (batch,) = make_batches(examples, TOKENIZER, batch_size=32, candidates=False)
        assert float(mean_token_loss(model, batch)) == pytest.approx(expected, rel=1e-4)


def test_written_answers_are_learned(tmp_path: Path) -> None:
    task = load_task(tmp_path, parity_rows(100), **WRITTEN, **ANSWER)
    training = train(make_run(make_model(), task))[1]
    assert training.losses[-1] < 0.7 * training.losses[0]


def test_several_tasks_are_drawn_by_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [0, 0]
    tasks = make_tasks(tmp_path, 200)
    make_part = loop._part

    def counting(run: Run, task: Any) -> Any:
        number = int(task.calibration[0].prompt.startswith("Number :"))
        part = make_part(run, task)

        def counted(model: Any, batch: Any) -> Any:
            drawn[number] += batch.num_examples
            return part.loss(model, batch)

        return replace(part, loss=counted)

    monkeypatch.setattr(loop, "_part", counting)
    tune = TuneConfig(steps=6, batch_size=8)
    model = make_model()
    train(make_run(model, *tasks, tune=tune, task_weights=(1.0, 2.0)))
    order = interleaved([1.0, 2.0], 48)
    assert drawn == [order.count(0), order.count(1)] == [16, 32]
    assert SIZE["prompt"].startswith("Number :")


def test_the_size_of_the_passes_changes_nothing(dense: PreTrainedModel, task: Task) -> None:
    # A high rate would amplify rounding.
    tune = TuneConfig(steps=40, learning_rate=2e-3)
    first, second = (train(make_run(copy.deepcopy(dense), task, tune=tune, batch_size=size)) for size in (16, 3))
    assert first[1].losses == pytest.approx(second[1].losses, rel=1e-3)
    assert first[2] == second[2]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the training end with an error in a step."""
    take = Trainer._step

    def stopping(self: Any) -> float:
        if self.training.steps == step:
            raise KeyboardInterrupt
        return take(self)

    monkeypatch.setattr(Trainer, "_step", stopping)


def names(directory: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in directory.iterdir())


def test_a_stopped_training_goes_on_to_the_same_weights(
    dense: PreTrainedModel, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_adapters, expected, key = train(make_run(copy.deepcopy(dense), task))
    model = copy.deepcopy(dense)
    before = weights(model)
    with monkeypatch.context() as patch:
        stop_at(patch, SAVE_STEPS + 5)
        with pytest.raises(KeyboardInterrupt):
            train(make_run(model, task, work_dir=tmp_path))
    assert_same(weights(model), before)
    assert names(tmp_path) == ["tuning"]
    taken: list[int] = []
    take = Trainer._step

    def counting(self: Any) -> float:
        taken.append(self.training.steps)
        return take(self)

    monkeypatch.setattr(Trainer, "_step", counting)
    adapters, resumed, stored_key = train(make_run(model, task, work_dir=tmp_path))
    assert taken == list(range(SAVE_STEPS, QUICK.steps))
    assert_same(adapters.values(), expected_adapters.values())
    assert replace(resumed, seconds=0) == replace(expected, seconds=0)
    assert names(tmp_path) == ["tuned"]
    # Without a work directory the model has no hash.
    assert key != stored_key

    again, figures, _ = train(make_run(copy.deepcopy(dense), task, work_dir=tmp_path))
    assert len(taken) == QUICK.steps - SAVE_STEPS
    assert_same(again.values(), expected_adapters.values())
    assert figures == resumed


def test_each_setting_and_the_data_have_a_result_of_their_own(
    dense: PreTrainedModel, task: Task, tmp_path: Path
) -> None:
    tiny = TuneConfig(steps=1)
    (tmp_path / "data").mkdir()
    other = load_task(tmp_path / "data", parity_rows(600, seed=5))
    runs: list[dict[str, Any]] = [
        {},
        *({"tune": replace(tiny, **change)} for change in ({"steps": 2}, {"rank": 2}, {"learning_rate": 1e-2})),
        {"seed": 1},
        {"exclude_modules": ("q_proj",)},
    ]
    work: dict[str, Any] = {"tune": tiny, "work_dir": tmp_path / "work"}
    keys = [train(make_run(dense, task, **{**work, **settings}))[2] for settings in runs]
    keys.append(train(make_run(dense, other, **work))[2])
    keys.append(train(make_run(learn(task, steps=2), task, **work))[2])
    assert len(set(keys)) == len(keys) == 8
    assert names(tmp_path / "work") == ["tuned"] * 8


def test_a_loss_that_is_not_finite_is_refused(dense: PreTrainedModel, task: Task) -> None:
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = weights(model)
    with pytest.raises(
        ValueError, match=r"loss of tuning .* must be finite, got a loss of nan. Lower `tune\.learning_rate`"
    ):
        train(make_run(model, task))
    after = weights(model)
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())
