"""`HealConfig`: the settings of healing, their defaults and rules. Does not import torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .validate import check_choice, check_flag, check_float, check_integer, check_known


HEAL_LOSSES = ("candidates", "vocabulary")


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    r"""Settings of healing: a short distillation of a pruned model's factors against the dense model.

    Args:
        steps (`int`):
            Steps of the optimizer at most.
        learning_rate (`float`):
            Rate of AdamW at its height, as a part of the root mean square of each factor: it rises over the first tenth
            of the steps and falls to 0 along a cosine.
        batch_size (`int`):
            Calibration examples of each step.
        rows_per_pass (`int`):
            Rows per forward pass; gradients of the passes of one step are added up. Less takes less memory.
        loss (`str`):
            What is held to the dense model: `"candidates"` (its distribution over the task's candidate texts) or
            `"vocabulary"` (its next-token distributions along the gold answer). A task without candidates always takes
            `"vocabulary"`.
        gold_weight (`float`):
            Share of the loss that is the gold answer's negative log-likelihood, from 0 up to below 1. 0 holds the
            model to the dense one alone.
        eval_steps (`int`):
            Steps between two scores on the monitored part of the selection split; the state is kept as often.
        patience (`int`):
            Scores in a row without gain after which healing stops. The best weights are taken.
        monitor_fraction (`float`):
            Part of the selection split that is monitored. With a `tolerance`, the rest decides on the size.
        rounds (`int`):
            How often pruning and healing alternate on the way to the size, in equal ratios. Each round takes moments
            on the model healed so far.
        train_norms (`bool`):
            Whether the weights of normalization layers are trained too.
        gradient_checkpointing (`bool`):
            Whether activations are computed twice instead of kept, which takes less memory.

    Raises:
        ValueError: If a value breaks its rule; the message names the setting, the rule and the value.

    Example:

    ```python
    >>> HealConfig(steps=32).loss
    'candidates'

    ```
    """

    steps: int = 128
    learning_rate: float = 5e-4
    batch_size: int = 16
    rows_per_pass: int = 16
    loss: str = "candidates"
    gold_weight: float = 0.5
    eval_steps: int = 16
    patience: int = 4
    monitor_fraction: float = 0.25
    rounds: int = 1
    train_norms: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_choice("heal.loss", self.loss, HEAL_LOSSES)
        for name in ("steps", "batch_size", "rows_per_pass", "eval_steps", "patience", "rounds"):
            check_integer(f"heal.{name}", getattr(self, name), 1)
        check_float("heal.learning_rate", self.learning_rate, 0.0, 1.0, False)
        check_float("heal.gold_weight", self.gold_weight, 0.0, 1.0, True)
        check_float("heal.monitor_fraction", self.monitor_fraction, 0.0, 1.0, False)
        for name in ("train_norms", "gradient_checkpointing"):
            check_flag(f"heal.{name}", getattr(self, name))

    def monitor_count(self, num_examples: int) -> int:
        """Return how many of the selection split's examples are monitored; the others come after them.

        Raises:
            ValueError: If fewer than two would be monitored, or left.
        """
        count = round(num_examples * self.monitor_fraction)
        if not 2 <= count <= num_examples - 2:
            raise ValueError(
                "`heal.monitor_fraction` must monitor at least 2 selection examples and leave 2, got "
                f"{self.monitor_fraction} of {num_examples}. Add rows to the selection split."
            )
        return count

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types, sorted by name."""
        return dict(sorted(dataclasses.asdict(self).items()))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HealConfig:
        """Make settings from `to_dict`'s output.

        Raises:
            ValueError: If a key is unknown (the message names the closest known one) or a value breaks its rule.
        """
        check_known(list(values), [field.name for field in dataclasses.fields(cls)], "HealConfig")
        return cls(**values)
