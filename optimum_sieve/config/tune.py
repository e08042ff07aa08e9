"""`TuneConfig`: every setting of tuning, with its default and its rule. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from .validate import check_candidates, check_flag, check_float, check_integer, check_known


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    r"""Settings of tuning: a short training of the dense model on the gold answers, by LoRA, before it is pruned.

    Every layer that will be pruned gets an adapter: \(W + 2\,B A\) with the factors \(B\) and \(A\) of rank `rank`.
    After training, the adapters are merged into the weights. The settings from `batch_size` on are advanced.

    Args:
        rank (`int`):
            Rank of the adapters. Their scale is 2, as for a LoRA alpha of twice the rank.
        steps (`int`):
            Number of optimizer steps.
        learning_rate (`float`):
            Peak learning rate of AdamW; 10 % warmup, cosine decay.
        batch_size (`int`):
            Calibration examples per step.
        max_candidates (`int`):
            Most candidates of an example in a step, the gold one and random others, where candidates have several
            tokens; at least 2. 0: all. Of the same examples, each epoch sees other candidates.
        gradient_checkpointing (`bool`):
            Recompute activations in the backward pass instead of storing them, to save memory.

    Raises:
        ValueError: If a value breaks its rule; the message names the setting, the rule and the value.

    Example:

    ```python
    >>> TuneConfig(steps=128).rank
    8

    ```
    """

    rank: int = 8
    steps: int = 64
    learning_rate: float = 5e-4
    batch_size: int = 16
    max_candidates: int = 16
    gradient_checkpointing: bool = False

    # Settings that the command line shows only with `--help-all`.
    ADVANCED: ClassVar[tuple[str, ...]] = ("batch_size", "max_candidates", "gradient_checkpointing")

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_size"):
            check_integer(f"tune.{name}", getattr(self, name), 1)
        check_candidates("tune.max_candidates", self.max_candidates)
        check_float("tune.learning_rate", self.learning_rate, 0.0, 1.0, False)
        check_flag("tune.gradient_checkpointing", self.gradient_checkpointing)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types, sorted by name."""
        return dict(sorted(dataclasses.asdict(self).items()))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TuneConfig:
        """Make settings from `to_dict`'s output.

        Raises:
            ValueError: If a key is unknown (the message names the closest known one) or a value breaks its rule.
        """
        check_known(list(values), [field.name for field in dataclasses.fields(cls)], "TuneConfig")
        return cls(**values)
