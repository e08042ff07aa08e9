"""A toy model that has learned the toy task, and pruned copies of it that have forgotten part of it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from toy import load_task, make_model, make_tokenizer, parity_rows, unhealed

from optimum_sieve import HealConfig, evaluate
from optimum_sieve.allocation.stage import allocate_ranks
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.calibration.losses import answer_loss
from optimum_sieve.calibration.stage import calibrate
from optimum_sieve.evaluation.batches import make_batches
from optimum_sieve.evaluation.teacher import Lesson
from optimum_sieve.healing.loop import heal
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.pipeline.prepare import prepare
from optimum_sieve.surgery.apply import apply_ranks


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.evaluation.teacher import Teacher
    from optimum_sieve.tasks import Example, Task

TOKENIZER = make_tokenizer()
QUICK = HealConfig(steps=24, learning_rate=3e-2)
# Models that `learn` trained.
_LEARNED: dict[str, PreTrainedModel] = {}


def save_learned(directory: Path) -> None:
    """Write a task file, and a model that does the task with its tokenizer as `directory/model`."""
    learn(load_task(directory, parity_rows(600))).save_pretrained(directory / "model")
    make_tokenizer().save_pretrained(directory / "model")


def learn(
    task: Task,
    model: PreTrainedModel | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    steps: int = 200,
) -> PreTrainedModel:
    """Train a toy model on the calibration split until it does the task; the same training is done once a process."""
    tokenizer = tokenizer or make_tokenizer()
    examples = task.examples("calibration", tokenizer)
    if model is not None:
        return _train(model, examples, tokenizer, steps)
    key = repr((examples, tokenizer.backend_tokenizer.to_str(), steps))
    if key not in _LEARNED:
        _LEARNED[key] = _train(make_model(initializer_range=0.05), examples, tokenizer, steps)
    return copy.deepcopy(_LEARNED[key])


def _train(
    model: PreTrainedModel, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, steps: int
) -> PreTrainedModel:
    model.train()
    batches = make_batches(examples, tokenizer, batch_size=32, candidates=False, inputs=input_format(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        batch = batches[step % len(batches)]
        (answer_loss(model, batch) / batch.num_examples).backward()
        optimizer.step()
    return model.eval()


def prune(
    dense: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any
) -> PreTrainedModel:
    """Return a copy of a dense model with factors, neither healed nor scored."""
    config = unhealed(**{"pruning_ratio": 0.97, "rank_multiple": 1, "rounds": 1, **settings})
    model, tokenizer = copy.deepcopy(dense), tokenizer or make_tokenizer()
    run = prepare(model, tokenizer, [task], config, work_dir=None, study_storage=None, progress=False)
    bases = calibrate(run)
    apply_ranks(model, bases, allocate_ranks(run, bases, 1 - (config.pruning_ratio or 0)), storage=config.storage)
    return model


def split(task: Task, name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Example]:
    """Return the examples of a split."""
    return list(task.examples(name, tokenizer or make_tokenizer()))


def run(model: PreTrainedModel, teacher: Teacher, task: Task, config: HealConfig = QUICK, **options: Any) -> Any:
    """Heal on the calibration split."""
    lesson = Lesson(teacher=teacher, examples=split(task, "calibration"))
    return heal(model, [lesson], TOKENIZER, config, progress=False, **options)


def score(model: PreTrainedModel, task: Task) -> Any:
    """Score on the test split."""
    return evaluate(model, split(task, "test"), TOKENIZER, metric="accuracy", batch_size=32, progress=False)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def products(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the products of all factorized layers, whatever their storage."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Assert that two sets of tensors are equal but for rounding."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-5, msg=name)


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Assert that two sets of tensors are equal, bit for bit."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
