"""Rules that several settings of a `SieveConfig` must meet together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._messages import shown

from .heal import HealConfig
from .tune import TuneConfig


if TYPE_CHECKING:
    from .sieve import SieveConfig


def check_combinations(config: SieveConfig) -> None:
    """Raise if two settings of `config` contradict each other.

    Raises:
        ValueError: If they do; the message names both settings and their values.
        TypeError: If `heal` is not a `HealConfig`, or `tune` not a `TuneConfig`.
    """
    if (config.tolerance is None) == (config.pruning_ratio is None):
        raise ValueError(
            "Exactly one of `tolerance` (largest acceptable drop in the metric, such as 0.02) and `pruning_ratio` "
            "(fraction of parameters to remove, such as 0.5) must be set, got tolerance="
            f"{shown(config.tolerance)} and pruning_ratio={shown(config.pruning_ratio)}."
        )
    _check_allocation(config)
    _check_healing(config)
    _check_tuning(config)
    if config.vocabulary_size is not None and config.vocabulary != "task":
        raise ValueError(
            f"`vocabulary_size` must go with vocabulary='task', got {config.vocabulary_size} and vocabulary="
            f"{config.vocabulary!r}. Set vocabulary='task'."
        )


def _check_allocation(config: SieveConfig) -> None:
    if config.latency_target is not None and config.allocation != "energy":
        raise ValueError(
            f"`latency_target` must go with allocation='energy', got {config.latency_target} and allocation="
            f"{config.allocation!r}. Set allocation='energy', or omit `latency_target`."
        )
    if config.projection == "learned" and (config.allocation != "uniform" or config.pruning_ratio is None):
        raise ValueError(
            "`projection='learned'` must go with allocation='uniform' and a `pruning_ratio`, got "
            f"allocation={config.allocation!r} and pruning_ratio={config.pruning_ratio}. Each adapter is trained for "
            "one rank, so there is no loss curve to allocate or search with."
        )


def _check_tuning(config: SieveConfig) -> None:
    if not isinstance(config.tune, TuneConfig) and config.tune not in (None, "auto"):
        kind = ValueError if isinstance(config.tune, str) else TypeError
        raise kind(f"`tune` must be a TuneConfig, 'auto' or None, got {shown(config.tune)}.")
    if config.reference == "tuned" and config.tune is None:
        raise ValueError(
            f"`reference='tuned'` must go with a TuneConfig, got tune={config.tune!r}. Set `tune` (`--tune`), or omit "
            "`reference`."
        )
    compares = config.allocation == "genetic" and config.tolerance is not None
    if compares and isinstance(config.tune, TuneConfig) and config.reference != "tuned":
        raise ValueError(
            "`reference` must be 'tuned' with `tune`, a tolerance and allocation='genetic', whose search compares with "
            f"the model it prunes, got {config.reference!r}. Set reference='tuned'."
        )


def _check_healing(config: SieveConfig) -> None:
    if isinstance(config.heal, HealConfig) or config.heal in (None, "auto"):
        return
    if isinstance(config.heal, str):
        raise ValueError(f"`heal` must be a HealConfig, 'auto' or None, got {shown(config.heal)}.")
    raise TypeError(f"`heal` must be a HealConfig, 'auto' or None, got {shown(config.heal)}.")
