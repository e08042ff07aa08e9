"""Rules that several settings of a `SieveConfig` must meet together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve._messages import shown

from .heal import HealConfig


if TYPE_CHECKING:
    from .sieve import SieveConfig


def check_combinations(config: SieveConfig) -> None:
    """Raise if two settings of `config` contradict each other.

    Raises:
        ValueError: If they do; the message names both settings and their values.
        TypeError: If `heal` is not a `HealConfig`.
    """
    _check_allocation(config)
    _check_healing(config)
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


def _check_healing(config: SieveConfig) -> None:
    if config.heal is None:
        return
    if not isinstance(config.heal, HealConfig):
        raise TypeError(f"`heal` must be a HealConfig or None, got {shown(config.heal)}.")
    if config.allocation == "genetic" and (config.tolerance is not None or config.heal.rounds > 1):
        raise ValueError(
            "`heal` with a `tolerance` or several rounds must go with allocation='energy' or 'uniform', got "
            "'genetic', whose search does not heal its candidates. Set a `pruning_ratio` and one round of healing."
        )
    if config.projection == "learned" and config.heal.rounds > 1:
        raise ValueError(
            f"`heal.rounds` must be 1 with projection='learned', got {config.heal.rounds}: adapters are trained for "
            "one size."
        )
