r"""Heal a pruned model: train its factors for a few steps to match the dense model.

A step depends on the settings and its number alone, and everything that it changes is stored in the work directory, so
a stopped run resumes to the same weights.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm.auto import tqdm

from optimum_sieve.backbone.fingerprint import model_key
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.training import training_only
from optimum_sieve.evaluation.batches import encode, input_device, pack
from optimum_sieve.evaluation.teacher import lessons_fingerprint
from optimum_sieve.evaluation.token_ids import padding_id
from optimum_sieve.run.workdir import WorkDir, content_key

from .optimizer import FactorTraining, HeldAsFactors, trained_parameters
from .sampling import drawn_examples, interleaved


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.config.heal import HealConfig
    from optimum_sieve.evaluation.batches import Batch
    from optimum_sieve.evaluation.teacher import Lesson, Teacher


_WARMUP = 0.1
# Raise it when the same settings give other weights: results of earlier versions are then computed again.
FORMAT = 2
_STATE, _RESULT = "healing", "healed"


class Monitor(Protocol):
    """Scores a model on examples that it is not trained on."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the scores depend on, besides the model."""

    def __call__(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return `"score"`, the higher the better, and mostly `"kl"`, which breaks ties."""


@dataclass(kw_only=True)
class Healing:
    """Figures of one training.

    Args:
        steps (`int`): Number of steps, including those after the best one.
        examples (`int`): Number of training examples.
        seconds (`float`): Wall-clock time, over all parts of a training that was stopped.
        best_step (`int`): Step whose weights were kept; 0: the weights before training.
        evaluations (`list[dict]`): The monitor's figures from step 0 on, with `"step"` and the mean `"loss"` of the
            steps since the previous evaluation.
    """

    steps: int = 0
    examples: int
    seconds: float = 0.0
    best_step: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures a report shows."""
        figures: dict[str, Any] = {**vars(self), "seconds": round(self.seconds, 3)}
        if self.evaluations and "score" in self.evaluations[0]:
            best = next(record for record in self.evaluations if record["step"] == self.best_step)
            for name, record in (("before", self.evaluations[0]), ("after", best)):
                figures[name] = {key: record[key] for key in ("score", "kl", "tasks") if key in record}
        return figures


def heal(
    model: PreTrainedModel,
    lessons: Sequence[Lesson],
    tokenizer: PreTrainedTokenizerBase,
    config: HealConfig,
    *,
    monitor: Monitor | None = None,
    seed: int = 0,
    work: WorkDir | None = None,
    pruned_key: str | None = None,
    progress: bool = True,
) -> Healing:
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
        monitor (`Monitor`, *optional*): Scores the model before training and every `eval_steps`; the best weights are
            kept. Default: the weights of the last step are kept.
        seed (`int`): Seed of the examples' order.
        work (`WorkDir`, *optional*): Stores the state every `eval_steps`, and the result.
        pruned_key (`str`, *optional*): Hash of `model`. Default: computed from all of its weights if `work` has a path.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        [`Healing`]: Figures of the training. After an error the model is unchanged.

    Raises:
        ValueError: If the model has no factorized layer, or the loss or its gradient is not finite.
    """
    trainer = _Trainer(model, lessons, tokenizer, config, monitor, seed, work or WorkDir(None), pruned_key)
    try:
        if not trainer.load_result():
            with training_only(model, trainer.training.parameters, checkpointing=config.gradient_checkpointing):
                trainer.train(progress)
    except BaseException:
        trainer.held.undo()
        raise
    # Without improvement the layers stay bit-identical.
    if trainer.healing.best_step:
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
        monitor: Monitor | None,
        seed: int,
        work: WorkDir,
        pruned_key: str | None,
    ) -> None:
        self.model, self.lessons, self.config, self.monitor, self.seed, self.work = (
            model, lessons, config, monitor, seed, work,
        )  # fmt: skip
        inputs = input_format(model)
        self.rows = [
            encode(lesson.examples, tokenizer, candidates=lesson.teacher.by_candidate, inputs=inputs)
            for lesson in lessons
        ]
        self.order = interleaved([lesson.weight for lesson in lessons], config.steps * config.batch_size)
        self.pack = partial(
            pack, batch_size=config.rows_per_pass, pad_id=padding_id(tokenizer, inputs), kind=inputs.kind
        )
        self.processes = PartialState()
        self.healing = Healing(examples=sum(map(len, self.rows)))
        self.best: dict[str, torch.Tensor] = {}
        self.key = content_key(
            # Slow: every byte is read. The key only names files.
            model=model_key(model) if pruned_key is None and work.path is not None else pruned_key,
            teacher=lessons_fingerprint(lessons),
            settings=config.to_dict(),
            monitor=None if monitor is None else monitor.fingerprint,
            seed=seed,
            format=FORMAT,
        )
        self.held = HeldAsFactors(model)
        self.training = FactorTraining(trained_parameters(model, norms=config.train_norms))

    def load_result(self) -> bool:
        """Load the weights of a finished training from the work directory; return whether they are there."""
        stored = self.work.load_with_record(_RESULT, self.key)
        if stored is not None:
            self.training.assign(stored[0])
            self.healing = Healing(**stored[1])
            # Left by a run that was killed before it could remove it.
            self.work.remove(_STATE, self.key)
        return stored is not None

    def train(self, progress: bool) -> None:
        """Take the remaining steps."""
        self._resume()
        losses: list[float] = []
        started = time.perf_counter()
        with tqdm(total=self.config.steps, initial=self.healing.steps, desc="healing", unit="step",
                  disable=not (progress and self.processes.is_main_process)) as bar:  # fmt: skip
            if self.monitor is not None and not self.healing.evaluations:
                self._evaluate(losses)
            # If all ranks are 0 and no layer has a bias, there is nothing to train.
            while self.training.parameters and self.healing.steps < self.config.steps and not self._is_stalled():
                losses.append(self._step())
                bar.update()
                if self.healing.steps % self.config.eval_steps == 0 or self.healing.steps == self.config.steps:
                    bar.set_postfix(loss=f"{np.mean(losses):.4f}")
                    self._evaluate(losses)
                    now = time.perf_counter()
                    self.healing.seconds += now - started
                    started = now
                    best = {f"best|{name}": value for name, value in self.best.items()}
                    self._save(_STATE, {**self.training.state(), **best})
        if self.best:
            self.training.assign(self.best)
        else:
            self.healing.best_step = self.healing.steps
        self._save(_RESULT, self.training.values())
        self.work.remove(_STATE, self.key)
        self.processes.wait_for_everyone()

    def _resume(self) -> None:
        stored = self.work.load_with_record(_STATE, self.key)
        if stored is not None:
            tensors, record = stored
            prefix = "best|"
            kept = [name for name in tensors if name.startswith(prefix)]
            self.best = {name.removeprefix(prefix): tensors.pop(name) for name in kept}
            self.training.restore(tensors)
            self.healing = Healing(**record)

    def _step(self) -> float:
        """Take one step; return its loss, the mean over its examples."""
        mine = self._passes()[self.processes.process_index :: self.processes.num_processes]
        total = torch.zeros((), device=self.processes.device)
        for teacher, batch in mine:
            loss = self._loss(teacher, batch) / self.config.batch_size
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
        self.training.step(self.config.learning_rate * _schedule(self.healing.steps, self.config.steps))
        self.healing.steps += 1
        return float(total)

    def _passes(self) -> list[tuple[Teacher, Batch]]:
        """Return the passes of the next step: its examples in batches of one lesson each."""
        device, start = input_device(self.model), self.healing.steps * self.config.batch_size
        chosen = self.order[start : start + self.config.batch_size]
        passes: list[tuple[Teacher, Batch]] = []
        for number, (lesson, rows) in enumerate(zip(self.lessons, self.rows, strict=True)):
            before, count = self.order[:start].count(number), chosen.count(number)
            drawn = [rows[index] for index in drawn_examples(range(before, before + count), len(rows), self.seed)]
            passes += [(lesson.teacher, batch.to(device)) for batch in self.pack(drawn)]
        return passes

    def _loss(self, teacher: Teacher, batch: Batch) -> torch.Tensor:
        divergences, gold = teacher.losses(self.model, batch)
        weight = self.config.gold_weight
        return ((1 - weight) * divergences + weight * gold).sum()

    def _evaluate(self, losses: list[float]) -> None:
        """Record the mean of `losses`, which are cleared, and the monitor's score; keep the best weights."""
        record: dict[str, Any] = {"step": self.healing.steps}
        if losses:
            record["loss"] = float(np.mean(losses))
            losses.clear()
        if self.monitor is not None:
            record |= self.monitor(self.model)
            if not self.best or _merit(record) > max(map(_merit, self.healing.evaluations)):
                self.best = self.training.values()
                self.healing.best_step = self.healing.steps
        self.healing.evaluations.append(record)

    def _is_stalled(self) -> bool:
        """Return whether the last `patience` evaluations brought no improvement."""
        since = [record for record in self.healing.evaluations if record["step"] > self.healing.best_step]
        return self.monitor is not None and len(since) >= self.config.patience

    def _save(self, stage: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.work.save(stage, self.key, tensors, record=vars(self.healing))


def _merit(record: Mapping[str, Any]) -> tuple[float, float]:
    return record["score"], -record.get("kl", 0.0)


def _schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate at `step` (from 0): linear warmup to 1, then cosine decay to 0."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
