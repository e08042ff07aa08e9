"""The ranks of a run at a size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .allocators import LatencyBudget, allocate


if TYPE_CHECKING:
    from collections.abc import Mapping

    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.run.context import Run

    from .budget import Ranks


def allocate_ranks(run: Run, bases: Mapping[str, FactorBasis], kept: float) -> Ranks:
    """Choose every target's rank (`None` = dense) so that the fraction `kept` of their parameters is left."""
    config = run.config
    total = sum(target.num_parameters for target in run.targets)
    latency = None
    if run.latencies is not None and config.latency_target is not None:
        latency = LatencyBudget(run.latencies, config.latency_target)
    return allocate(
        run.loss_curves(bases),
        int(kept * total),
        # A genetic search starts from the energy allocation.
        allocation="uniform" if config.allocation == "uniform" else "energy",
        storage=config.storage,
        multiple=config.rank_multiple,
        latency=latency,
    )
