r"""Heal a pruned model: train its factors for a few steps until it answers as the dense model does.

What a step does depends on the settings and its number alone, and all that it changes is kept in the work directory,
so a run that was stopped goes on to the same weights.
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

from optimum_sieve.backbone.fingerprint import architecture, model_fingerprint
from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.training import training_only
from optimum_sieve.evaluation.batches import encode, input_device, pack, padding_id
from optimum_sieve.evaluation.teacher import lessons_fingerprint
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
    """How well a model does on examples that it is not trained on."""

    @property
    def fingerprint(self) -> str:
        """Hash of what the scores depend on beside the model."""

    def __call__(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return `"score"`, the higher the better, and mostly `"kl"`, which decides between equal scores."""


@dataclass(kw_only=True)
class Healing:
    """What a run of healing did.

    Args:
        steps (`int`): Steps taken, those after the best one included.
        examples (`int`): Examples there were to train on.
        seconds (`float`): Wall-clock time, over all parts of a run that was stopped.
        best_step (`int`): Step whose weights were taken; 0: those from before.
        evaluations (`list[dict]`): `"step"` and what the monitor returned, from step 0 on, and the mean `"loss"` of the
            steps since the one before.
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
            best = next(one for one in self.evaluations if one["step"] == self.best_step)
            for name, found in (("before", self.evaluations[0]), ("after", best)):
                figures[name] = {key: found[key] for key in ("score", "kl", "tasks") if key in found}
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
    progress: bool = True,
) -> Healing:
    r"""Train the factors of a pruned model, in place, against the dense model.

    The loss of an example is \((1 - w)\, \mathrm{KL}(\text{dense} \Vert \text{model}) - w \log p(\text{gold})\) with
    the gold weight \(w\). Of several lessons, examples are drawn in proportion to their weights. Ranks and storage
    stay, and so does all that is not trained. There is no dropout. Under `accelerate launch` the processes share the
    passes of each step.

    Args:
        model (`PreTrainedModel`): A model with factorized layers, of type `sieve` or about to become one.
        lessons (`Sequence[Lesson]`): The calibration examples of each task, and what
            [`teach`][optimum_sieve.evaluation.teacher.teach] made of them.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        config ([`HealConfig`][optimum_sieve.config.heal.HealConfig]): The settings.
        monitor (`Monitor`, *optional*): Scores the model every `eval_steps`; the best weights are taken, those from
            before among them. `None`: those of the last step.
        seed (`int`): Seed of the examples' order.
        work (`WorkDir`, *optional*): Keeps the state every `eval_steps`, and the result.
        progress (`bool`): Whether a progress bar is shown.

    Returns:
        [`Healing`]: What was done. After an error the model is as it was before.

    Raises:
        ValueError: If the model has no factorized layer, or the loss or its gradient is not finite.
    """
    run = _Run(model, lessons, tokenizer, config, monitor, seed, work or WorkDir(None))
    try:
        if not run.load_result():
            with training_only(model, run.training.parameters, checkpointing=config.gradient_checkpointing):
                run.train(progress)
    except BaseException:
        run.held.undo()
        raise
    # Where nothing was gained, the layers are exactly what they were.
    if run.healing.best_step:
        run.held.pivot()
    else:
        run.held.undo()
    return run.healing


class _Run:
    """One run of healing: what it reads, and where it stands."""

    def __init__(
        self,
        model: PreTrainedModel,
        lessons: Sequence[Lesson],
        tokenizer: PreTrainedTokenizerBase,
        config: HealConfig,
        monitor: Monitor | None,
        seed: int,
        work: WorkDir,
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
            model=model_fingerprint(model),
            architecture=architecture(model),
            teacher=lessons_fingerprint(lessons),
            settings=config.to_dict(),
            monitor=None if monitor is None else monitor.fingerprint,
            seed=seed,
            format=FORMAT,
        )
        self.held = HeldAsFactors(model)
        self.training = FactorTraining(trained_parameters(model, norms=config.train_norms))

    def load_result(self) -> bool:
        """Take the weights of a run that has ended from the work directory, if they are there."""
        found = self.work.load_with_record(_RESULT, self.key)
        if found is not None:
            self.training.assign(found[0])
            self.healing = Healing(**found[1])
        return found is not None

    def train(self, progress: bool) -> None:
        """Take the steps that are left."""
        self._resume()
        losses: list[float] = []
        started = time.perf_counter()
        with tqdm(total=self.config.steps, initial=self.healing.steps, desc="healing", unit="step",
                  disable=not (progress and self.processes.is_main_process)) as bar:  # fmt: skip
            if self.monitor is not None and not self.healing.evaluations:
                self._evaluate(losses)
            # Where all ranks are 0 and nothing has a bias, there is nothing to train.
            while self.training.parameters and self.healing.steps < self.config.steps and not self._is_stalled():
                losses.append(self._step())
                bar.update()
                if self.healing.steps % self.config.eval_steps == 0 or self.healing.steps == self.config.steps:
                    bar.set_postfix(loss=f"{np.mean(losses):.4f}")
                    self._evaluate(losses)
                    now = time.perf_counter()
                    self.healing.seconds += now - started
                    started = now
                    self._save(_STATE, {**self.training.state(), **_named("best", self.best)})
        if self.best:
            self.training.assign(self.best)
        else:
            self.healing.best_step = self.healing.steps
        self._save(_RESULT, self.training.values())
        self.work.remove(_STATE, self.key)
        self.processes.wait_for_everyone()

    def _resume(self) -> None:
        found = self.work.load_with_record(_STATE, self.key)
        if found is not None:
            tensors, record = found
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
        """Return the passes of the next step: its examples in batches, which are of one lesson each."""
        device, start = input_device(self.model), self.healing.steps * self.config.batch_size
        chosen = self.order[start : start + self.config.batch_size]
        passes: list[tuple[Teacher, Batch]] = []
        for number, (lesson, rows) in enumerate(zip(self.lessons, self.rows, strict=True)):
            before, count = self.order[:start].count(number), chosen.count(number)
            own = [rows[index] for index in drawn_examples(range(before, before + count), len(rows), self.seed)]
            passes += [(lesson.teacher, batch.to(device)) for batch in self.pack(own)]
        return passes

    def _loss(self, teacher: Teacher, batch: Batch) -> torch.Tensor:
        divergences, gold = teacher.losses(self.model, batch)
        weight = self.config.gold_weight
        return ((1 - weight) * divergences + weight * gold).sum()

    def _evaluate(self, losses: list[float]) -> None:
        """Record the mean of `losses`, which are cleared, and, with a monitor, the score; keep the best weights."""
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
        """Tell whether the last `patience` scores brought no gain."""
        since = [one for one in self.healing.evaluations if one["step"] > self.healing.best_step]
        return self.monitor is not None and len(since) >= self.config.patience

    def _save(self, stage: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.work.save(stage, self.key, tensors, record=vars(self.healing))


def _merit(record: Mapping[str, Any]) -> tuple[float, float]:
    return record["score"], -record.get("kl", 0.0)


def _named(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{prefix}|{name}": tensor for name, tensor in tensors.items()}


def _schedule(step: int, steps: int) -> float:
    """Return the part of the learning rate at `step` (from 0): linear to 1 over the warmup, then a cosine to 0."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
