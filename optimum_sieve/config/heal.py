"""`HealConfig`: every setting of healing, with its default and its rule. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from .validate import check_candidates, check_choice, check_flag, check_float, check_integer, check_known, drop_removed


HEAL_LOSSES = ("candidates", "vocabulary")
# Largest kept fraction that is healed with a tolerance.
LARGEST_HEALED = 0.9
# Sizes that are healed for a `pruning_ratio`, and the largest one before the last. See docs/healing.md#steps-and-sizes.
_SIZES = 3
_LARGEST_BEFORE = 0.5


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    r"""Settings of healing: short trainings that distill the dense model into the factors of the pruned one.

    A run prunes to falling sizes and heals each of them, going on from the healed factors of a larger one. The
    settings from `adapter_rank` on are advanced: their defaults suit almost every run.

    Args:
        steps (`int`):
            Optimizer steps for each size.
        learning_rate (`float`):
            Peak learning rate of AdamW; 10 % warmup, cosine decay.
        shrink (`float`):
            Kept fraction of each size relative to the next larger one, above 0 and below 1. Where the tolerance
            decides, its fourth power below a kept fraction of .1, and a size may be left out. Up to two larger sizes,
            each of at most half, come before that of a `pruning_ratio`.
        adapter_rank (`int`):
            Rank of the LoRA adapters that are trained on both factors of every layer, with a scale of 2, and merged
            into them after each size. 0 trains all entries of the factors; the learning rate is then relative to each
            factor's root mean square, and 2e-4 is a good value.
        batch_size (`int`):
            Examples per step.
        rows_per_pass (`int`):
            Rows per forward pass; gradients accumulate over the passes of a step. Smaller values save memory.
        loss (`str`):
            Distribution that is matched to the dense model's: `"candidates"` (over the task's candidate texts) or
            `"vocabulary"` (next tokens along the gold answer). Tasks without candidates always use `"vocabulary"`.
        gold_weight (`float`):
            Weight of the gold answer's negative log-likelihood in the loss, from 0 up to below 1. 0 matches the dense
            model alone, as always where the data has no answers and for crossed prompts.
        written_share (`float`):
            Share of the examples whose answers the pruned model has written itself, before each size, for tasks with
            written answers; from 0 up to below 1. The dense model predicts their next tokens.
        crossed_prompts (`int`):
            Additional prompts for tasks that have the same labels in every row, each the first words of one calibration
            prompt and the last words of another. The dense model answers them itself. Only with `loss="candidates"`.
            A quarter as many where steps see `max_candidates` of more.
        prompt_sites (`int`):
            Random positions in each prompt whose next tokens are matched as well, for tasks with written answers and
            with `loss="vocabulary"`.
        train_norms (`bool`):
            Also train the weights of normalization layers.
        max_candidates (`int`):
            Most candidates of an example in a step, the gold one and random others, where candidates have several
            tokens; at least 2. 0: all. Of the same examples, each epoch sees other candidates.
        gradient_checkpointing (`bool`):
            Recompute activations in the backward pass instead of storing them, to save memory.

    Raises:
        ValueError: If a value breaks its rule; the message names the setting, the rule and the value.

    Example:

    ```python
    >>> HealConfig(steps=64).loss
    'candidates'

    ```
    """

    steps: int = 64
    learning_rate: float = 5e-4
    shrink: float = 0.85
    adapter_rank: int = 8
    batch_size: int = 16
    rows_per_pass: int = 16
    loss: str = "candidates"
    gold_weight: float = 0.5
    written_share: float = 0.5
    crossed_prompts: int = 512
    prompt_sites: int = 32
    train_norms: bool = False
    max_candidates: int = 16
    gradient_checkpointing: bool = False

    # Settings that the command line shows only with `--help-all`.
    ADVANCED: ClassVar[tuple[str, ...]] = (
        *("adapter_rank", "batch_size", "rows_per_pass", "loss", "gold_weight", "written_share", "crossed_prompts"),
        *("prompt_sites", "train_norms", "max_candidates", "gradient_checkpointing"),
    )

    def __post_init__(self) -> None:
        check_choice("heal.loss", self.loss, HEAL_LOSSES)
        for name in ("steps", "batch_size", "rows_per_pass"):
            check_integer(f"heal.{name}", getattr(self, name), 1)
        for name in ("learning_rate", "shrink"):
            check_float(f"heal.{name}", getattr(self, name), 0.0, 1.0, False)
        for name in ("gold_weight", "written_share"):
            check_float(f"heal.{name}", getattr(self, name), 0.0, 1.0, True)
        for name in ("adapter_rank", "crossed_prompts", "prompt_sites"):
            check_integer(f"heal.{name}", getattr(self, name), 0)
        check_candidates("heal.max_candidates", self.max_candidates)
        for name in ("train_norms", "gradient_checkpointing"):
            check_flag(f"heal.{name}", getattr(self, name))

    def sizes_to(self, kept: float) -> list[float]:
        """Return the kept fractions that are healed on the way to a given one, which is the last.

        Up to two larger ones come before it, each of at most half.

        Example:

        ```python
        >>> [round(size, 3) for size in HealConfig().sizes_to(0.2)]
        [0.277, 0.235, 0.2]

        ```
        """
        before = (kept / self.shrink**number for number in range(_SIZES - 1, 0, -1))
        return [*(size for size in before if size <= _LARGEST_BEFORE), kept]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types, sorted by name."""
        return dict(sorted(dataclasses.asdict(self).items()))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HealConfig:
        """Make settings from `to_dict`'s output. Settings of earlier versions that were removed are dropped.

        Raises:
            ValueError: If a key is unknown (the message names the closest known one) or a value breaks its rule.
        """
        values = drop_removed(values, _REMOVED)
        check_known(list(values), [field.name for field in dataclasses.fields(cls)], "HealConfig")
        return cls(**values)


# Settings of earlier versions -> what holds now.
_REMOVED = {"start": _LARGEST_BEFORE, "rounds": 1, "eval_steps": 16, "patience": 4, "monitor_fraction": 0.25}
