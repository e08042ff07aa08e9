"""`HealConfig`: every setting of healing, with its default and its rule. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from .validate import check_choice, check_flag, check_float, check_integer, check_known


HEAL_LOSSES = ("candidates", "vocabulary")


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    r"""Settings of healing: a short training that distills the dense model into the factors of the pruned one.

    The settings from `batch_size` on are advanced: their defaults suit almost every run.

    Args:
        steps (`int`):
            Maximum number of optimizer steps.
        learning_rate (`float`):
            Peak learning rate of AdamW relative to each factor's RMS; 10 % warmup, cosine decay.
        rounds (`int`):
            Rounds of pruning and healing until the final size, each with the same ratio. Every round calibrates on the
            model healed so far.
        batch_size (`int`):
            Calibration examples per step.
        rows_per_pass (`int`):
            Rows per forward pass; gradients accumulate over the passes of a step. Smaller values save memory.
        loss (`str`):
            Distribution that is matched to the dense model's: `"candidates"` (over the task's candidate texts) or
            `"vocabulary"` (next tokens along the gold answer). Tasks without candidates always use `"vocabulary"`.
        gold_weight (`float`):
            Weight of the gold answer's negative log-likelihood in the loss, from 0 up to below 1. 0 matches the dense
            model alone.
        eval_steps (`int`):
            Steps between evaluations on the monitored part of the selection split; each one saves a checkpoint.
        patience (`int`):
            Stop after this many evaluations without improvement; keep the best weights.
        monitor_fraction (`float`):
            Fraction of the selection split to monitor. With a `tolerance`, the rest decides the size.
        train_norms (`bool`):
            Also train the weights of normalization layers.
        gradient_checkpointing (`bool`):
            Recompute activations in the backward pass instead of storing them, to save memory.

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
    rounds: int = 1
    batch_size: int = 16
    rows_per_pass: int = 16
    loss: str = "candidates"
    gold_weight: float = 0.5
    eval_steps: int = 16
    patience: int = 4
    monitor_fraction: float = 0.25
    train_norms: bool = False
    gradient_checkpointing: bool = False

    # Settings that the command line shows only with `--help-all`.
    ADVANCED: ClassVar[tuple[str, ...]] = (
        *("batch_size", "rows_per_pass", "loss", "gold_weight", "eval_steps", "patience", "monitor_fraction"),
        *("train_norms", "gradient_checkpointing"),
    )

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
        """Return the number of selection examples to monitor; they are the first ones.

        Raises:
            ValueError: If fewer than two examples would be monitored or remain.
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
