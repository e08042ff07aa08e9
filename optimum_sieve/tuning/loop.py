r"""Train LoRA adapters of a dense model on the gold answers of the calibration examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.training import training_only
from optimum_sieve.calibration.losses import label_loss
from optimum_sieve.config.tune import TuneConfig
from optimum_sieve.evaluation.batches import log_likelihoods
from optimum_sieve.training.adapters import Adapters
from optimum_sieve.training.loop import TUNING, Part, Trainer
from optimum_sieve.training.negatives import COPIES, drawn_copies, has_many_candidates


if TYPE_CHECKING:
    from torch import nn

    from optimum_sieve.evaluation.batches import Batch
    from optimum_sieve.run.context import Run, TaskRun
    from optimum_sieve.training.steps import Training


# Raise it when the same settings give other weights: results of earlier versions are then computed again.
_FORMAT = 2


def train(run: Run) -> tuple[Adapters, Training, str]:
    """Train adapters of the run's targets, or read them from the work directory; the model is not changed.

    The loss of an example is the cross-entropy of the gold candidate among the candidates or, for written answers, the
    mean negative log-likelihood of the answer's tokens. Examples of several tasks are drawn in proportion to the tasks'
    weights. There is no dropout. Under `accelerate launch` the processes divide the passes of each step.

    Args:
        run (`Run`): The run, whose model is dense and whose settings have `tune`.

    Returns:
        `tuple[Adapters, Training, str]`: The adapters, not merged; figures; and a hash of all that they depend on.

    Raises:
        ValueError: If the loss or its gradient is not finite.
    """
    config, names = tune_config(run), [target.name for target in run.targets]
    key = run.key(
        "seed",
        settings=config.to_dict(),
        examples=[(task.fingerprint("calibration"), task.weight) for task in run.tasks],
        targets=names,
        format=_FORMAT,
    )
    adapters = Adapters(run.model, names, config.rank, run.config.seed)
    trainer = Trainer(
        TUNING, run.model, run.tokenizer, [_part(run, task) for task in run.tasks], adapters.parameters, config,
        rows_per_pass=run.config.batch_size, seed=run.config.seed, work=run.work, key=key,
    )  # fmt: skip
    if not trainer.load_result():
        checkpointing = config.gradient_checkpointing
        with training_only(run.model, adapters.parameters, checkpointing=checkpointing), adapters.attached():
            trainer.train(progress=run.progress)
    return adapters, trainer.training, key


def tune_config(run: Run) -> TuneConfig:
    """Return the settings of a run that tunes."""
    assert isinstance(run.config.tune, TuneConfig)
    return run.config.tune


def _part(run: Run, task: TaskRun) -> Part:
    """Return the calibration examples of a task with the loss of their gold answers."""
    examples, weight, most, copies = task.calibration, task.weight, tune_config(run).max_candidates, 1
    if all(example.candidates for example in examples):
        if has_many_candidates(examples, most, run.tokenizer, input_format(run.model)):
            copies = COPIES
            examples, _ = drawn_copies(examples, most, copies, seed=run.config.seed)
        loss = label_loss([example.target or 0 for example in examples])
        return Part(examples=examples, loss=loss, by_candidate=True, weight=weight, copies=copies)
    return Part(examples=examples, loss=mean_token_loss, by_candidate=False, weight=weight)


def mean_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return each gold answer's negative log-likelihood divided by its number of tokens, summed over the batch."""
    sums = log_likelihoods(model, batch)[:, 0]
    lengths = torch.bincount(batch.reads[:, 2], minlength=batch.num_examples).to(sums.device)
    return -(sums / lengths).sum()
