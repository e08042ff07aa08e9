"""The ranks of a run at a size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .allocators import LatencyBudget, allocate


if TYPE_CHECKING:
    from collections.abc import Mapping

    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.run.context import Setting

    from .budget import Ranks


def allocate_ranks(setting: Setting, bases: Mapping[str, FactorBasis], kept: float) -> Ranks:
    """Choose every target's rank (`None` = dense) so that the fraction `kept` of their parameters is left."""
    config = setting.config
    total = sum(target.num_parameters for target in setting.targets)
    latency = None
    if setting.latencies is not None and config.latency_target is not None:
        latency = LatencyBudget(setting.latencies, config.latency_target)
    return allocate(
        setting.loss_curves(bases),
        int(kept * total),
        # A genetic search starts from the energy allocation.
        allocation="uniform" if config.allocation == "uniform" else "energy",
        storage=config.storage,
        multiple=config.rank_multiple,
        latency=latency,
    )
