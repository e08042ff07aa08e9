"""What healing and tuning share: the figures of a training, and the loop over its steps with the states it saves."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import PartialState

from optimum_sieve.run.bars import progress_bar
from optimum_sieve.run.events import emit


if TYPE_CHECKING:
    from collections.abc import Callable


# Steps between two saved states, which a stopped training resumes from.
SAVE_STEPS = 16


@dataclass(kw_only=True)
class Training:
    """Figures of one training.

    Args:
        steps (`int`): Number of steps.
        examples (`int`): Number of training examples.
        seconds (`float`): Wall-clock time, over all parts of a training that was stopped.
        losses (`list[float]`): Mean loss of every `SAVE_STEPS` steps, in nats per example.
    """

    steps: int = 0
    examples: int
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures a report shows."""
        return {**vars(self), "seconds": round(self.seconds, 3)}


def take_steps(
    training: Training,
    steps: int,
    take: Callable[[], float],
    save: Callable[[], object],
    *,
    name: str,
    progress: bool,
    steps_before: int = 0,
) -> None:
    """Take the remaining steps of a training and record them in its figures.

    Args:
        training ([`Training`]): The figures so far.
        steps (`int`): Number of steps in all.
        take (`Callable`): Takes one step, counts it in `training` and returns its loss.
        save (`Callable`): Saves the state; called every `SAVE_STEPS` steps but the last.
        name (`str`): Label of the progress bar.
        progress (`bool`): Whether the first process shows a progress bar.
        steps_before (`int`): Steps of earlier trainings, which callbacks and trackers count.
    """
    losses: list[float] = []
    started = time.perf_counter()
    shown = progress and PartialState().is_main_process
    with progress_bar(total=steps, initial=training.steps, desc=name, unit="step", progress=shown) as bar:
        while training.steps < steps:
            losses.append(take())
            bar.update()
            if training.steps % SAVE_STEPS and training.steps < steps:
                continue
            training.losses.append(float(np.mean(losses)))
            emit(name, steps_before + training.steps, loss=training.losses[-1])
            bar.set_postfix(loss=f"{training.losses[-1]:.4f}")
            losses.clear()
            now = time.perf_counter()
            training.seconds += now - started
            started = now
            if training.steps < steps:
                save()
