"""Tuning in the plan of a run: its memory and its steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve.config.tune import TuneConfig

from .memory import element_size


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.config.sieve import SieveConfig

# Per parameter of the adapters, in float32: its value, its gradient and both moments of AdamW.
_STATE_BYTES = 4 * 4


def tune_bytes(model: nn.Module, targets: Sequence[Target], config: SieveConfig, *, on_cpu: bool) -> int:
    """Return the bytes that tuning adds to the model: the adapters' state, and the weights before it in CPU memory.

    Args:
        model (`torch.nn.Module`): The model, which needs no weights.
        targets (`Sequence[Target]`): The matrices to prune.
        config (`SieveConfig`): The settings.
        on_cpu (`bool`): Whether the model computes there, so that these weights are in the same memory.
    """
    if not isinstance(config.tune, TuneConfig):
        return 0
    trained = config.tune.rank * sum(target.in_features + target.out_features for target in targets)
    copied = sum(target.num_parameters for target in targets) if on_cpu else 0
    return trained * _STATE_BYTES + copied * element_size(model, targets)


def describe_tuning(config: SieveConfig) -> str | None:
    """Return the steps of tuning as text; `None` without it."""
    tune = config.tune
    return (
        None
        if not isinstance(tune, TuneConfig)
        else f"{tune.steps:,} steps of {tune.batch_size} examples, LoRA of rank {tune.rank}"
    )
