r"""Train parameters of a model for a fixed number of steps.

A step depends on the settings and its number alone, and everything that it changes is stored in the work directory, so
a stopped run resumes to the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from optimum_sieve.backbone.kinds import input_format
from optimum_sieve.backbone.modes import loss_scale
from optimum_sieve.evaluation.batches import encode, input_device, pack
from optimum_sieve.evaluation.token_ids import padding_id
from optimum_sieve.evaluation.trees.arrangement import arranged

from .optimizer import ParameterTraining
from .sampling import interleaved, schedule, step_examples
from .steps import Training, take_steps


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from optimum_sieve.config.heal import HealConfig
    from optimum_sieve.config.tune import TuneConfig
    from optimum_sieve.evaluation.batches import Batch
    from optimum_sieve.run.workdir import WorkDir
    from optimum_sieve.tasks import Example


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Examples of one task and what is trained on them.

    Args:
        examples (`Sequence[Example]`): The examples.
        loss (`Callable`): Maps the model and a batch to the losses of its examples, a tensor of any shape that is
            summed.
        by_candidate (`bool`): Whether batches hold every candidate of an example or its answer alone.
        weight (`float`): Sampling weight relative to other parts.
        copies (`int`): How often `examples` holds each example, all of them one after the other; epochs take the copies
            in turn.
    """

    examples: Sequence[Example]
    loss: Callable[[PreTrainedModel, Batch], torch.Tensor]
    by_candidate: bool
    weight: float
    copies: int = 1


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Words of a kind of training.

    Args:
        name (`str`): Its name in messages and on the progress bar.
        setting (`str`): The setting that holds its settings.
        state (`str`): Stage of the work directory that holds a state to resume from.
        result (`str`): Stage that holds the trained parameters.
    """

    name: str
    setting: str
    state: str
    result: str


HEALING = Kind(name="healing", setting="heal", state="healing", result="healed")
TUNING = Kind(name="tuning", setting="tune", state="tuning", result="tuned")


class Trainer:
    """One training: its inputs and its state. Under `accelerate launch` the processes divide the passes of each step.

    Args:
        kind (`Kind`): `HEALING` or `TUNING`.
        model (`PreTrainedModel`): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        parts (`Sequence[Part]`): Examples, drawn in proportion to the weights of their parts.
        parameters (`Mapping[str, torch.nn.Parameter]`): What is trained.
        config (`HealConfig | TuneConfig`): Number of steps, batch size and learning rate.
        relative (`bool`): Whether the learning rate is relative to the root mean square of each parameter.
        rows_per_pass (`int`): Rows of a forward pass.
        seed (`int`): Seed of the examples' order.
        steps_before (`int`): Steps taken by earlier trainings; their examples are not drawn again in this epoch.
        work (`WorkDir`): Stores the state every `SAVE_STEPS` steps, and the result.
        key (`str`): Hash of all that the result depends on.

    The attribute `training` holds the figures.
    """

    def __init__(
        self,
        kind: Kind,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        parts: Sequence[Part],
        parameters: Mapping[str, nn.Parameter],
        config: HealConfig | TuneConfig,
        *,
        relative: bool = False,
        rows_per_pass: int,
        seed: int,
        steps_before: int = 0,
        work: WorkDir,
        key: str,
    ) -> None:
        self.kind, self.model, self.config, self.seed, self.work, self.key = kind, model, config, seed, work, key
        self._parts, self._steps_before = parts, steps_before
        inputs = input_format(model)
        encoded = (encode(part.examples, tokenizer, candidates=part.by_candidate, inputs=inputs) for part in parts)
        self._rows = [arranged(rows, model) for rows in encoded]
        self._lengths = [[row.length for row in rows] for rows in self._rows]
        self._order = interleaved([part.weight for part in parts], (steps_before + config.steps) * config.batch_size)
        self._pack = partial(pack, batch_size=rows_per_pass, pad_id=padding_id(tokenizer, inputs), kind=inputs.kind)
        self._processes = PartialState()
        self._optimizer = ParameterTraining(parameters, scale=loss_scale(model.parameters()), relative=relative)
        self.training = Training(examples=sum(len(part.examples) // part.copies for part in parts))

    def load_result(self) -> bool:
        """Load the parameters of a finished training from the work directory; return whether they are there."""
        stored = self.work.load_with_record(self.kind.result, self.key)
        if stored is not None:
            self._optimizer.assign(stored[0])
            self.training = Training(**stored[1])
            # Left by a run that was killed before it could remove it.
            self.work.remove(self.kind.state, self.key)
        return stored is not None

    def train(self, *, progress: bool) -> None:
        """Take the remaining steps.

        Raises:
            ValueError: If the loss or its gradient is not finite.
        """
        self._resume()
        # If all ranks are 0, there may be nothing to heal.
        if self._optimizer.parameters:
            take_steps(
                self.training, self.config.steps, self._step,
                lambda: self._save(self.kind.state, self._optimizer.state()),
                name=self.kind.name, progress=progress, steps_before=self._steps_before,
            )  # fmt: skip
        self._save(self.kind.result, self._optimizer.values())
        self.work.remove(self.kind.state, self.key)
        self._processes.wait_for_everyone()

    def _resume(self) -> None:
        stored = self.work.load_with_record(self.kind.state, self.key)
        if stored is not None:
            self._optimizer.restore(stored[0])
            self.training = Training(**stored[1])

    def _step(self) -> float:
        """Take one step; return its loss, the mean over its examples."""
        mine = self._passes()[self._processes.process_index :: self._processes.num_processes]
        total = torch.zeros((), device=self._processes.device)
        for part, batch in mine:
            loss = part.loss(self.model, batch).sum() / self.config.batch_size
            self._optimizer.backward(loss)
            total += loss.detach().to(total.device)
        if self._processes.num_processes > 1:
            for gradient in self._optimizer.gradients():
                gradient.copy_(reduce(gradient, reduction="sum"))
            total = reduce(total, reduction="sum")
        try:
            if not torch.isfinite(total):
                raise FloatingPointError(f"a loss of {total.item()}")
            self._optimizer.step(self.config.learning_rate * schedule(self.training.steps, self.config.steps))
        except FloatingPointError as error:
            raise ValueError(
                f"The loss of {self.kind.name} and its gradient must be finite, got {error}. Lower "
                f"`{self.kind.setting}.learning_rate`, or load the model in bfloat16 or float32."
            ) from None
        self.training.steps += 1
        return float(total)

    def _passes(self) -> list[tuple[Part, Batch]]:
        """Return the passes of the next step: its examples in batches of one part each."""
        device, step = input_device(self.model), self._steps_before + self.training.steps
        copies = [part.copies for part in self._parts]
        draws = step_examples(self._order, self._lengths, step, self.config.batch_size, self.seed, copies)
        return [
            (part, batch.to(device))
            for part, rows, drawn in zip(self._parts, self._rows, draws, strict=True)
            for batch in self._pack([rows[index] for index in drawn])
        ]

    def _save(self, stage: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.work.save(stage, self.key, tensors, record=vars(self.training))
