"""Healing in the plan of a run: whether it fits, its memory and its steps."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from optimum_sieve.config.heal import LARGEST_HEALED, HealConfig
from optimum_sieve.config.tune import TuneConfig


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.config.sieve import SieveConfig

    from .plan import PrunePlan


logger = logging.getLogger(__name__)

# Per trained parameter, in float32: its value now and at the start, its gradient, and both moments of AdamW.
_TRAINED_BYTES = 5 * 4
_UNTUNED = (
    "`reference` must be 'dense' where `tune='auto'` does not tune, got 'tuned': it tunes where the data has gold "
    "answers and the run heals, without a genetic search. Set `tune` to a TuneConfig (`--tune`), or reference='dense'."
)
# The size that is trained, and the last accepted one.
_SIZES_AT_ONCE = 2


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
    # Whether it may stay untuned is asked at the end.
    reference = "dense" if config.tune == "auto" else config.reference
    unhealed = _settle_tuning(replace(config, heal=None, reference=reference), labelled)
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
    if config.reference == "tuned" and unhealed.tune is None:
        raise ValueError(_UNTUNED)
    return replace(unhealed, reference=config.reference)


def _settle_tuning(config: SieveConfig, labelled: bool) -> SieveConfig:
    if config.tune != "auto":
        return config
    tunes = labelled and config.heal is not None and config.allocation != "genetic"
    if config.reference == "tuned" and not tunes:
        raise ValueError(_UNTUNED)
    return replace(config, tune=TuneConfig() if tunes else None)


def heal_bytes(config: SieveConfig, targets: Sequence[Target], element: int) -> int:
    """Return the bytes of factors, adapters, gradients and optimizer state while the largest size is healed.

    Args:
        config (`SieveConfig`): The settings.
        targets (`Sequence[Target]`): The matrices to prune.
        element (`int`): Bytes of an element of their weights.
    """
    heal = config.heal
    if not isinstance(heal, HealConfig):
        return 0
    kept = LARGEST_HEALED if config.pruning_ratio is None else config.healed_sizes[0]
    factors = round(sum(target.num_parameters for target in targets) * kept)
    # Pivots are trained as factors, which have up to twice as many parameters, and stored as pivots.
    trained, stored = (2 * factors, 3 * factors) if config.storage == "pivoted" else (factors, factors)
    if heal.adapter_rank:
        trained = heal.adapter_rank * sum(_widths(target, kept, config.storage) for target in targets)
    return _SIZES_AT_ONCE * stored * element + trained * _TRAINED_BYTES


def _widths(target: Target, kept: float, storage: str) -> int:
    """Return inputs and outputs of both factors of a matrix at a kept fraction, in sum."""
    widths, parameters = target.out_features + target.in_features, kept * target.num_parameters
    rank = parameters / widths
    if storage == "pivoted":
        # r (m + n - r) parameters.
        rank = (widths - math.sqrt(widths**2 - 4 * parameters)) / 2
    return widths + 2 * min(target.max_rank, math.ceil(rank))


def describe_healing(config: SieveConfig) -> str | None:
    """Return an upper bound of the healing steps as text; `None` without healing."""
    heal = config.heal
    if not isinstance(heal, HealConfig):
        return None
    each = f"{heal.steps:,} steps of {heal.batch_size} examples"
    trained = (
        f"; LoRA of rank {heal.adapter_rank} on both factors" if heal.adapter_rank else "; all entries of the factors"
    )
    if config.pruning_ratio is None:
        return f"{each} for each of several falling sizes, until two in a row exceed the tolerance{trained}"
    sizes = len(config.healed_sizes)
    examples = sizes * heal.steps * heal.batch_size
    count = f"{sizes} x {each}, {examples:,} forward and backward" if sizes > 1 else f"{each}, forward and backward"
    return count + trained
