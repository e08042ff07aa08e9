"""Healing brings a pruned model back to the dense one in a fixed number of steps; nothing else changes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from healed_world import (
    TOKENIZER,
    assert_same,
    products,
    prune,
    run,
    score,
    split,
    weights,
)
from model_kinds import make_model as make_other_model
from toy import make_model, make_tokenizer

from optimum_sieve import compare
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.config.heal import HealConfig
from optimum_sieve.evaluation.batches import make_batches
from optimum_sieve.evaluation.teacher import CandidateTeacher, Lesson, VocabularyTeacher, teach
from optimum_sieve.healing.factors import trained_parameters
from optimum_sieve.healing.loop import heal
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.training.optimizer import ParameterTraining
from optimum_sieve.training.sampling import schedule


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from optimum_sieve.evaluation.teacher import Teacher
    from optimum_sieve.tasks import Task


def factorized(model: PreTrainedModel) -> list[FactorizedLinear]:
    return [module for module in model.modules() if isinstance(module, FactorizedLinear)]


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("loss", ["candidates", "vocabulary"])
def test_healing_lowers_the_divergence_on_examples_it_has_not_seen(
    dense: PreTrainedModel, task: Task, storage: str, loss: str
) -> None:
    model = prune(dense, task, storage=storage)
    shapes = [(layer.storage, layer.rank) for layer in factorized(model)]
    assert storage in dict(shapes)
    before, reference = score(model, task), score(dense, task)
    teacher = teach(dense, split(task, "calibration"), TOKENIZER, loss=loss, progress=False)
    assert type(teacher) is {"candidates": CandidateTeacher, "vocabulary": VocabularyTeacher}[loss]
    run(model, teacher, task, HealConfig(steps=60, learning_rate=3e-2, loss=loss, gold_weight=0.0))
    after = score(model, task)
    assert compare(reference, after).kl < 0.5 * compare(reference, before).kl
    assert after.score > before.score
    assert [(layer.storage, layer.rank) for layer in factorized(model)] == shapes


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
@pytest.mark.parametrize("name", ["t5", "bart", "bert", "llama-classifier"])
def test_encoder_decoders_and_classifiers_are_healed(name: str, storage: str, task: Task) -> None:
    tokenizer, dense = make_tokenizer(after="</s>"), make_other_model(name)
    model = prune(dense, task, tokenizer, pruning_ratio=0.8, allocation="uniform", storage=storage)
    examples, held_out = split(task, "calibration", tokenizer), split(task, "test", tokenizer)
    rate = 1e-3 if name == "bert" else 1e-2
    config = HealConfig(steps=30, learning_rate=rate, gold_weight=0.0, gradient_checkpointing=name in ("bart", "bert"))
    divergences = []
    for loss in ("candidates", "vocabulary"):
        healed = copy.deepcopy(model)
        teacher = teach(dense, examples, tokenizer, loss=loss, progress=False)
        heal(healed, [Lesson(teacher=teacher, examples=examples)], tokenizer, config, progress=False)
        unseen = teach(dense, held_out, tokenizer, loss=loss, progress=False)
        batches = make_batches(
            held_out, tokenizer, batch_size=64, candidates=unseen.by_candidate, inputs=input_format(dense)
        )
        with torch.no_grad():
            sums = [sum(unseen.losses(one, batch)[0].sum() for batch in batches) for one in (healed, model)]
        divergences.append(sums)
    for after, before in divergences:
        assert after < before


def test_only_factors_change_and_flags_are_restored(pruned: PreTrainedModel, teacher: Teacher, task: Task) -> None:
    before, flags = weights(pruned), {name: p.requires_grad for name, p in pruned.named_parameters()}
    pruned.train()
    run(pruned, teacher, task)
    trained = trained_parameters(pruned).keys()
    assert 0 < len(trained) < len(before)
    changed = {name for name, tensor in weights(pruned).items() if not torch.equal(tensor, before[name])}
    assert changed == trained
    assert {name: p.requires_grad for name, p in pruned.named_parameters()} == flags
    assert all(module.training for module in pruned.modules())
    assert all(parameter.grad is None for parameter in pruned.parameters())


def test_norms_are_trained_where_asked(pruned: PreTrainedModel, teacher: Teacher, task: Task) -> None:
    before = weights(pruned)
    run(pruned, teacher, task, HealConfig(steps=3, learning_rate=3e-2, train_norms=True))
    changed = {name for name, tensor in weights(pruned).items() if not torch.equal(tensor, before[name])}
    assert "model.norm.weight" in changed
    # Some lead to layers of rank 0 alone.
    assert changed <= trained_parameters(pruned, norms=True).keys()
    assert "model.embed_tokens.weight" not in changed


def test_every_step_is_taken_and_its_loss_is_reported(
    pruned: PreTrainedModel, teacher: Teacher, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = ParameterTraining.step
    monkeypatch.setattr(ParameterTraining, "step", lambda self, rate: rates.append(rate) or step(self, rate))
    done = run(pruned, teacher, task, HealConfig(steps=40, learning_rate=3e-2))
    assert done.steps == 40
    assert rates == pytest.approx([3e-2 * schedule(number, 40) for number in range(40)])
    # The mean of every 16 steps, and of the rest.
    assert len(done.losses) == 3
    assert done.losses[0] > done.losses[1] > done.losses[2] > 0
    assert (done.examples, done.to_dict()["steps"]) == (300, 40)
    assert done.seconds > 0


def test_sizes_draw_other_examples_of_one_epoch(pruned: PreTrainedModel, teacher: Teacher, task: Task) -> None:
    """Two trainings see every example before any twice, if the second counts the steps of the first."""
    seen: list[int] = []

    class Watching(CandidateTeacher):
        def losses(self, model: Any, batch: Any) -> Any:
            seen.extend(batch.indices)
            return super().losses(model, batch)

    assert isinstance(teacher, CandidateTeacher)
    watching = Watching(teacher.fingerprint, teacher.targets, teacher.log_probs)
    config = HealConfig(steps=5, batch_size=30, rows_per_pass=30)
    for before in (0, 5):
        run(copy.deepcopy(pruned), watching, task, config, steps_before=before)
    assert sorted(seen) == list(range(300))
    again = list(seen[150:])
    seen.clear()
    run(copy.deepcopy(pruned), watching, task, config, steps_before=5)
    assert seen == again


@pytest.mark.parametrize("settings", [{"rows_per_pass": 4}, {"gradient_checkpointing": True}])
def test_passes_and_checkpoints_change_nothing_but_rounding(
    pruned: PreTrainedModel, teacher: Teacher, task: Task, settings: dict[str, Any]
) -> None:
    plain, other = copy.deepcopy(pruned), pruned
    run(plain, teacher, task, HealConfig(steps=4, learning_rate=1e-2))
    run(other, teacher, task, HealConfig(steps=4, learning_rate=1e-2, **settings))
    assert all("forward" not in vars(module) for module in other.modules())
    expected = weights(plain)
    # AdamW divides by the gradient's size, so rounding shows where that is next to nothing.
    differences = torch.cat([(tensor - expected[name]).abs().flatten() for name, tensor in weights(other).items()])
    assert differences.mean() < 1e-5


@pytest.mark.parametrize(("checkpointing", "times"), [(False, 1), (True, 2)])
def test_blocks_are_computed_again_where_asked(
    pruned: PreTrainedModel, teacher: Teacher, task: Task, checkpointing: bool, times: int
) -> None:
    calls = []
    pruned.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    run(pruned, teacher, task, HealConfig(steps=3, gradient_checkpointing=checkpointing))
    assert len(calls) == 3 * times


def test_gold_answers_count_where_they_are_weighed(task: Task) -> None:
    dense = make_model()
    teacher = teach(dense, split(task, "calibration"), TOKENIZER, progress=False)

    def gold(weight: float) -> float:
        model = prune(dense, task, pruning_ratio=0.5)
        run(model, teacher, task, HealConfig(steps=30, learning_rate=1e-2, gold_weight=weight))
        found = score(model, task)
        return float(found.log_probs[range(found.count), found.targets].mean())

    assert gold(0.9) > gold(0.0) + 0.1


def test_bfloat16_factors_move_by_less_than_their_rounding(
    teacher: Teacher, dense: PreTrainedModel, task: Task
) -> None:
    model = prune(dense, task).bfloat16()
    parameters = trained_parameters(model)
    training = ParameterTraining(parameters, relative=True)
    name, parameter = next(iter(parameters.items()))
    before = parameter.detach().clone()
    for _ in range(100):
        for copy_ in training.copies.values():
            copy_.grad = torch.ones_like(copy_)
        training.step(learning_rate=1e-5)
    # The rate is a part of the factor's own size.
    moved = before.float() - training.copies[name]
    assert torch.allclose(moved / before.float().square().mean().sqrt(), torch.tensor(1e-3), rtol=0.05)
    assert parameter.dtype == torch.bfloat16
    assert torch.equal(parameter, training.copies[name].bfloat16())


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was(
    pruned: PreTrainedModel, teacher: Teacher, task: Task
) -> None:
    assert isinstance(teacher, CandidateTeacher)
    before = weights(pruned)
    broken = CandidateTeacher("broken", teacher.targets, torch.full_like(teacher.log_probs, float("nan")))
    with pytest.raises(
        ValueError, match=r"loss of healing .* must be finite, got a loss of nan. Lower `heal\.learning_rate`"
    ):
        run(pruned, broken, task)
    assert_same(weights(pruned), before)


def test_a_model_of_ranks_of_zero_stays_as_it_is(dense: PreTrainedModel, teacher: Teacher, task: Task) -> None:
    model = prune(dense, task, pruning_ratio=0.9999)
    assert not trained_parameters(model)
    before = weights(model)
    done = run(model, teacher, task)
    assert (done.steps, done.losses) == (0, [])
    assert_same(weights(model), before)


def test_a_dense_model_is_refused(dense: PreTrainedModel, teacher: Teacher, task: Task) -> None:
    with pytest.raises(ValueError, match="`model` must have factorized layers to heal, got none"):
        run(dense, teacher, task)


@pytest.mark.parametrize("storage", ["factors", "pivoted"])
def test_adapters_change_each_factor_by_their_rank(
    dense: PreTrainedModel, teacher: Teacher, task: Task, storage: str
) -> None:
    model = prune(dense, task, pruning_ratio=0.5, storage=storage)
    before = products(model)
    whole = copy.deepcopy(model)
    run(model, teacher, task, HealConfig(steps=3, adapter_rank=2))
    run(whole, teacher, task, HealConfig(steps=3, adapter_rank=0, learning_rate=1e-2))
    adapted, full = ({name: numeric_rank(weight - before[name]) for name, weight in products(each).items()}
                     for each in (model, whole))  # fmt: skip
    # The product changes by adapters of two factors, in sum four directions, or by all directions of the factors.
    assert max(adapted.values()) == 4
    assert max(full.values()) > 4


def numeric_rank(matrix: torch.Tensor) -> int:
    sizes = torch.linalg.svdvals(matrix.double())
    return int((sizes > 1e-3 * sizes.max()).sum())
