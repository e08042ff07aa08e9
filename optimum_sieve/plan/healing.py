"""Healing in the plan of a run: whether it fits, its memory and its steps."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from optimum_sieve.config.heal import LARGEST_HEALED, HealConfig
from optimum_sieve.config.tune import TuneConfig


if TYPE_CHECKING:
    from collections.abc import Callable

    from optimum_sieve.config.sieve import SieveConfig

    from .plan import PrunePlan


logger = logging.getLogger(__name__)

# Per trained parameter, in float32: its gradient, both moments of AdamW, its value and that of the last accepted size.
_HEAL_BYTES = 5 * 4


def settle_training(
    config: SieveConfig, plan_of: Callable[[SieveConfig], PrunePlan], *, labelled: bool = True, limited: bool = True
) -> SieveConfig:
    """Return the settings with `heal="auto"` and `tune="auto"` decided.

    A run heals wherever the whole model and its training fit in memory. A run that heals also tunes, if the data has
    gold answers and no search is shared, whose workers would have to tune as well.

    Args:
        config (`SieveConfig`): The settings.
        plan_of (`Callable`): Plans a run with other settings.
        labelled (`bool`): Whether the data of every task has gold answers.
        limited (`bool`): Whether memory is limited. If not, nothing is planned.

    Raises:
        ValueError: If the `memory_limit` is too low even without healing.
    """
    if config.heal != "auto":
        return _settle_tuning(config, labelled)
    healed = _settle_tuning(replace(config, heal=HealConfig()), labelled)
    unhealed = _settle_tuning(replace(config, heal=None), labelled)
    if not limited:
        return healed
    if plan_of(unhealed).blocks is None:
        try:
            plan_of(healed)
        except ValueError:
            # One block at a time, which cannot be healed.
            pass
        else:
            return healed
    logger.warning("The pruned model is not healed: its training does not fit in this memory. "
                   "`optimum-cli sieve heal` heals the saved model where it fits.")  # fmt: skip
    return unhealed


def _settle_tuning(config: SieveConfig, labelled: bool) -> SieveConfig:
    if config.tune != "auto":
        return config
    tunes = labelled and config.heal is not None and config.allocation != "genetic"
    return replace(config, tune=TuneConfig() if tunes else None)


def heal_bytes(config: SieveConfig, total: int) -> int:
    """Return the bytes of gradients, optimizer state and copies of weights while the largest size is healed.

    Args:
        config (`SieveConfig`): The settings.
        total (`int`): Parameters of all targets.
    """
    if not isinstance(config.heal, HealConfig):
        return 0
    kept = LARGEST_HEALED
    if config.pruning_ratio is not None:
        kept = min(config.heal.start, 1 - config.pruning_ratio)
    # Pivots are trained as factors, which have up to twice as many parameters.
    return round(total * kept) * (2 if config.storage == "pivoted" else 1) * _HEAL_BYTES


def describe_healing(config: SieveConfig) -> str | None:
    """Return an upper bound of the healing steps as text; `None` without healing."""
    heal = config.heal
    if not isinstance(heal, HealConfig):
        return None
    each = f"{heal.steps:,} steps of {heal.batch_size} examples"
    if config.pruning_ratio is None:
        return f"{each} for each of several falling sizes, until the tolerance is exceeded"
    sizes = len(heal.sizes_to(1 - config.pruning_ratio))
    examples = sizes * heal.steps * heal.batch_size
    return f"{sizes} x {each}, {examples:,} forward and backward" if sizes > 1 else f"{each}, forward and backward"
