r"""Train LoRA adapters of a dense model on the gold answers of the calibration examples.

A step depends on the settings and its number alone, and everything that it changes is stored in the work directory, so
a stopped run resumes to the same weights.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.modes import loss_scale
from optimum_sieve.backbone.training import training_only
from optimum_sieve.calibration.losses import label_loss
from optimum_sieve.config.tune import TuneConfig
from optimum_sieve.evaluation.batches import encode, input_device, log_likelihoods, pack
from optimum_sieve.evaluation.token_ids import padding_id
from optimum_sieve.healing.optimizer import restore_training, training_state
from optimum_sieve.healing.sampling import interleaved, schedule, step_examples
from optimum_sieve.healing.steps import Training, take_steps

from .adapters import Adapters


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.calibration.losses import Loss
    from optimum_sieve.evaluation.batches import Batch
    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Example


# Raise it when the same settings give other weights: results of earlier versions are then computed again.
_FORMAT = 1
# Gradient norm, over all adapters together, at which gradients are clipped.
_MAX_NORM = 1.0
_STATE, _RESULT = "tuning", "tuned"


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
    trainer = _Trainer(run)
    if not trainer.load_result():
        adapters = trainer.adapters
        checkpointing = trainer.config.gradient_checkpointing
        with training_only(run.model, adapters.parameters, checkpointing=checkpointing), adapters.attached():
            trainer.train()
    return trainer.adapters, trainer.training, trainer.key


class _Trainer:
    """One training: its inputs and its state."""

    def __init__(self, run: Run) -> None:
        self.run, self.model, self.config = run, run.model, tune_config(run)
        names = [target.name for target in run.targets]
        inputs = input_format(run.model)
        self.losses = [_gold_loss(task.calibration) for task in run.tasks]
        self.rows = [
            encode(task.calibration, run.tokenizer, candidates=by_candidate, inputs=inputs)
            for task, (_, by_candidate) in zip(run.tasks, self.losses, strict=True)
        ]
        self.order = interleaved([task.weight for task in run.tasks], self.config.steps * self.config.batch_size)
        self.pack = partial(
            pack, batch_size=run.config.batch_size, pad_id=padding_id(run.tokenizer, inputs), kind=inputs.kind
        )
        self.processes = PartialState()
        self.training = Training(examples=sum(map(len, self.rows)))
        self.key = run.key(
            "seed",
            settings=self.config.to_dict(),
            examples=[(task.fingerprint("calibration"), task.weight) for task in run.tasks],
            targets=names,
            format=_FORMAT,
        )
        self.adapters = Adapters(run.model, names, self.config.rank, run.config.seed)
        self.parameters = self.adapters.parameters
        self.scale = loss_scale(run.model.parameters())
        # Every step sets its learning rate.
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0, weight_decay=0.0)

    def load_result(self) -> bool:
        """Load the adapters of a finished training from the work directory; return whether they are there."""
        stored = self.run.work.load_with_record(_RESULT, self.key)
        if stored is not None:
            self.adapters.assign(stored[0])
            self.training = Training(**stored[1])
            # Left by a run that was killed before it could remove it.
            self.run.work.remove(_STATE, self.key)
        return stored is not None

    def train(self) -> None:
        """Take the remaining steps."""
        self._resume()
        take_steps(
            self.training, self.config.steps, self._step, self._save_state, name="tuning", progress=self.run.progress
        )
        self.run.work.save(_RESULT, self.key, self.adapters.values(), record=vars(self.training))
        self.run.work.remove(_STATE, self.key)
        self.processes.wait_for_everyone()

    def _step(self) -> float:
        """Take one step; return its loss, the mean over its examples."""
        total = torch.zeros((), device=self.processes.device)
        for loss_of, batch in self._passes()[self.processes.process_index :: self.processes.num_processes]:
            loss = loss_of(self.model, batch) / self.config.batch_size
            (loss * self.scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach().to(total.device)
        gradients = [self._gradient(parameter) for parameter in self.parameters.values()]
        if self.processes.num_processes > 1:
            for gradient in gradients:
                gradient.copy_(reduce(gradient, reduction="sum"))
            total = reduce(total, reduction="sum")
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), _MAX_NORM)
        if not (torch.isfinite(total) and torch.isfinite(norm)):
            raise ValueError(
                f"The loss of tuning and its gradient must be finite, got {total.item()} and a norm of {norm.item()}. "
                "Lower `tune.learning_rate`, or load the model in bfloat16 or float32."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * schedule(self.training.steps, self.config.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.training.steps += 1
        return float(total)

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the summed gradient of a parameter without its scale; 0 for experts that got no token."""
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad.div_(self.scale)

    def _passes(self) -> list[tuple[Loss, Batch]]:
        """Return the passes of the next step: its examples in batches of one task each."""
        device, counts = input_device(self.model), [len(rows) for rows in self.rows]
        seed = self.run.config.seed
        draws = step_examples(self.order, counts, self.training.steps, self.config.batch_size, seed)
        return [
            (loss, batch.to(device))
            for (loss, _), rows, drawn in zip(self.losses, self.rows, draws, strict=True)
            for batch in self.pack([rows[index] for index in drawn])
        ]

    def _save_state(self) -> None:
        """Store everything that the next step depends on."""
        state = training_state(self.parameters, self.optimizer)
        self.run.work.save(_STATE, self.key, state, record=vars(self.training))

    def _resume(self) -> None:
        """Set everything to the state in the work directory, if there is one."""
        stored = self.run.work.load_with_record(_STATE, self.key)
        if stored is not None:
            restore_training(self.parameters, self.optimizer, stored[0])
            self.training = Training(**stored[1])


def tune_config(run: Run) -> TuneConfig:
    """Return the settings of a run that tunes."""
    assert isinstance(run.config.tune, TuneConfig)
    return run.config.tune


def _gold_loss(examples: Sequence[Example]) -> tuple[Loss, bool]:
    """Return the loss of a task, a sum over the examples of a batch, and whether its batches hold every candidate."""
    if all(example.candidates for example in examples):
        return label_loss([example.target or 0 for example in examples]), True
    return mean_token_loss, False


def mean_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return each gold answer's negative log-likelihood divided by its number of tokens, summed over the batch."""
    sums = log_likelihoods(model, batch)[:, 0]
    lengths = torch.bincount(batch.reads[:, 2], minlength=batch.num_examples).to(sums.device)
    return -(sums / lengths).sum()
