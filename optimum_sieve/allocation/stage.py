"""Allocation as a stage of a run: a rank for every target at a given size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .allocators import LatencyBudget, LossCurve, allocate
from .budget import rank_parameters


if TYPE_CHECKING:
    from collections.abc import Mapping

    from optimum_sieve.backbone.targets import Target
    from optimum_sieve.factorization.closed_form import FactorBasis
    from optimum_sieve.run.context import Run

    from .budget import Ranks


def loss_curves(run: Run, bases: Mapping[str, FactorBasis]) -> list[LossCurve]:
    """Return the predicted loss of every target against its rank; directions that a basis lacks lose nothing."""

    def energy(target: Target) -> np.ndarray:
        values = bases[target.name].energy.cpu().numpy()
        return np.pad(values, (0, target.max_rank - len(values)))

    return [LossCurve(t.name, t.out_features, t.in_features, energy(t)) for t in run.targets]


def allocate_ranks(run: Run, bases: Mapping[str, FactorBasis], kept: float) -> Ranks:
    """Choose a rank for every target (`None` = dense) such that at most a fraction `kept` of their parameters remains.

    As ranks are multiples of `rank_multiple`, it may be less: see [`kept_fraction`].
    """
    config = run.config
    total = sum(target.num_parameters for target in run.targets)
    latency = None
    if run.latencies is not None and config.latency_target is not None:
        latency = LatencyBudget(run.latencies, config.latency_target)
    return allocate(
        loss_curves(run, bases),
        int(kept * total),
        # A genetic search starts from the energy allocation.
        allocation="uniform" if config.allocation == "uniform" else "energy",
        storage=config.storage,
        multiple=config.rank_multiple,
        latency=latency,
    )


def kept_fraction(run: Run, ranks: Ranks) -> float:
    """Return the fraction of the targets' parameters that `ranks` keep."""
    kept = 0
    for target in run.targets:
        rank = ranks[target.name]
        shape = (target.out_features, target.in_features)
        kept += target.num_parameters if rank is None else rank_parameters(rank, *shape, run.config.storage)
    return kept / sum(target.num_parameters for target in run.targets)
