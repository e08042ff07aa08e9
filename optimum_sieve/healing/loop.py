r"""Heal a pruned model: train its factors for a fixed number of steps to match the dense model.

A step depends on the settings and its number alone, and everything that it changes is stored in the work directory, so
a stopped run resumes to the same weights.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from optimum_sieve.backbone.fingerprint import model_key
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.training import training_only
from optimum_sieve.evaluation.batches import encode, input_device, pack
from optimum_sieve.evaluation.teacher import lessons_fingerprint
from optimum_sieve.evaluation.token_ids import padding_id
from optimum_sieve.run.workdir import WorkDir, content_key

from .optimizer import FactorTraining, HeldAsFactors, trained_parameters
from .sampling import interleaved, schedule, step_examples
from .steps import Training, take_steps


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.config.heal import HealConfig
    from optimum_sieve.evaluation.batches import Batch
    from optimum_sieve.evaluation.teacher import Lesson


# Raise it when the same settings give other weights: results of earlier versions are then computed again.
FORMAT = 4
_STATE, _RESULT = "healing", "healed"


def heal(
    model: PreTrainedModel,
    lessons: Sequence[Lesson],
    tokenizer: PreTrainedTokenizerBase,
    config: HealConfig,
    *,
    seed: int = 0,
    steps_before: int = 0,
    work: WorkDir | None = None,
    pruned_key: str | None = None,
    progress: bool = True,
) -> Training:
    r"""Train the factors of a pruned model, in place, to match the dense model.

    The loss of an example is \((1 - w)\, \mathrm{KL}(\text{dense} \Vert \text{model}) - w \log p(\text{gold})\) with
    the gold weight \(w\). Examples of several lessons are drawn in proportion to the lessons' weights. Ranks and
    storage do not change. There is no dropout. Under `accelerate launch` the processes divide the passes of each step.

    Args:
        model (`PreTrainedModel`): A model with factorized layers, converted to type `sieve` or not.
        lessons (`Sequence[Lesson]`): The calibration examples of each task with the dense model's predictions, see
            [`teach`][optimum_sieve.evaluation.teacher.teach].
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        config ([`HealConfig`][optimum_sieve.config.heal.HealConfig]): The settings.
        seed (`int`): Seed of the examples' order.
        steps_before (`int`): Steps taken before, at larger sizes; their examples are not drawn again in this epoch.
        work (`WorkDir`, *optional*): Stores the state every `SAVE_STEPS` steps, and the result.
        pruned_key (`str`, *optional*): Hash of the pruned model. Default: computed from all of its weights.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`Training`][optimum_sieve.healing.steps.Training]: Its figures. After an error pivoted layers are as they were,
            plain factors partly trained.

    Raises:
        ValueError: If the model has no factorized layer, or the loss or its gradient is not finite.
    """
    trainer = _Trainer(model, lessons, tokenizer, config, seed, steps_before, work or WorkDir(None), pruned_key)
    try:
        if not trainer.load_result():
            with training_only(model, trainer.training.parameters, checkpointing=config.gradient_checkpointing):
                trainer.train(progress)
    except BaseException:
        trainer.held.undo()
        raise
    # Without a step the layers stay bit-identical.
    if trainer.healing.steps:
        trainer.held.pivot()
    else:
        trainer.held.undo()
    return trainer.healing


class _Trainer:
    """One training: its inputs and its state."""

    def __init__(
        self,
        model: PreTrainedModel,
        lessons: Sequence[Lesson],
        tokenizer: PreTrainedTokenizerBase,
        config: HealConfig,
        seed: int,
        steps_before: int,
        work: WorkDir,
        pruned_key: str | None,
    ) -> None:
        self.model, self.lessons, self.config, self.seed, self.work = model, lessons, config, seed, work
        self.steps_before = steps_before
        inputs = input_format(model)
        self.rows = [
            encode(lesson.examples, tokenizer, candidates=lesson.teacher.by_candidate, inputs=inputs)
            for lesson in lessons
        ]
        draws = (steps_before + config.steps) * config.batch_size
        self.order = interleaved([lesson.weight for lesson in lessons], draws)
        self.pack = partial(
            pack, batch_size=config.rows_per_pass, pad_id=padding_id(tokenizer, inputs), kind=inputs.kind
        )
        self.processes = PartialState()
        self.healing = Training(examples=sum(map(len, self.rows)))
        self.key = content_key(
            # Slow: every byte is read. The key only names files.
            model=model_key(model) if pruned_key is None and work.path is not None else pruned_key,
            teacher=lessons_fingerprint(lessons),
            settings=config.to_dict(),
            seed=seed,
            steps_before=steps_before,
            format=FORMAT,
        )
        self.held = HeldAsFactors(model)
        self.training = FactorTraining(trained_parameters(model, norms=config.train_norms))

    def load_result(self) -> bool:
        """Load the weights of a finished training from the work directory; return whether they are there."""
        stored = self.work.load_with_record(_RESULT, self.key)
        if stored is not None:
            self.training.assign(stored[0])
            self.healing = Training(**stored[1])
            # Left by a run that was killed before it could remove it.
            self.work.remove(_STATE, self.key)
        return stored is not None

    def train(self, progress: bool) -> None:
        """Take the remaining steps."""
        self._resume()
        # If all ranks are 0 and no layer has a bias, there is nothing to train.
        if self.training.parameters:
            take_steps(
                self.healing, self.config.steps, self._step, lambda: self._save(_STATE, self.training.state()),
                name="healing", progress=progress,
            )  # fmt: skip
        self._save(_RESULT, self.training.values())
        self.work.remove(_STATE, self.key)
        self.processes.wait_for_everyone()

    def _resume(self) -> None:
        stored = self.work.load_with_record(_STATE, self.key)
        if stored is not None:
            self.training.restore(stored[0])
            self.healing = Training(**stored[1])

    def _step(self) -> float:
        """Take one step; return its loss, the mean over its examples."""
        mine = self._passes()[self.processes.process_index :: self.processes.num_processes]
        total = torch.zeros((), device=self.processes.device)
        for lesson, batch in mine:
            loss = self._loss(lesson, batch) / self.config.batch_size
            self.training.backward(loss)
            total += loss.detach().to(total.device)
        if self.processes.num_processes > 1:
            for gradient in self.training.gradients():
                gradient.copy_(reduce(gradient, reduction="sum"))
            total = reduce(total, reduction="sum")
        if not torch.isfinite(total):
            raise ValueError(
                f"The loss of healing must be finite, got {total.item()}. Lower `heal.learning_rate`, or load the "
                "model in bfloat16 or float32."
            )
        self.training.step(self.config.learning_rate * schedule(self.healing.steps, self.config.steps))
        self.healing.steps += 1
        return float(total)

    def _passes(self) -> list[tuple[Lesson, Batch]]:
        """Return the passes of the next step: its examples in batches of one lesson each."""
        device, step = input_device(self.model), self.steps_before + self.healing.steps
        counts = [len(rows) for rows in self.rows]
        draws = step_examples(self.order, counts, step, self.config.batch_size, self.seed)
        return [
            (lesson, batch.to(device))
            for lesson, rows, drawn in zip(self.lessons, self.rows, draws, strict=True)
            for batch in self.pack([rows[index] for index in drawn])
        ]

    def _loss(self, lesson: Lesson, batch: Batch) -> torch.Tensor:
        return lesson.losses(self.model, batch, self.config.gold_weight).sum()

    def _save(self, stage: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.work.save(stage, self.key, tensors, record=vars(self.healing))
