"""Factor many weights, divided among the processes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from optimum_sieve.factorization.closed_form import FactorBasis
from optimum_sieve.run import distributed
from optimum_sieve.run.bars import progress_bar


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.factorization.moments import TokenWeights

# See `FactorBasis.token_weights`; 0 weights tokens by their norms alone.
_WEIGHTING_POWERS = {"norms": 0.0, "balanced": 0.5, "likelihood": 1.0}


def token_weights(config: SieveConfig, bases: Mapping[str, FactorBasis]) -> dict[str, TokenWeights] | None:
    """Return the weighting of tokens by the bases of the previous round; `None` weights them by their norms alone."""
    power = _WEIGHTING_POWERS[config.weighting]
    if not (power and bases):
        return None
    return {name: partial(basis.token_weights, power=power) for name, basis in bases.items()}


def factor_together(
    weights: Mapping[str, torch.Tensor], factor: Callable[[str, torch.Tensor], FactorBasis], *, progress: bool
) -> dict[str, FactorBasis]:
    """Factor every weight (out, in) in one of the processes; return all bases in every process."""
    bases: dict[str, FactorBasis] = {}
    names = list(weights)
    for name in progress_bar(distributed.share(names), desc="factors", unit="matrix", progress=progress):
        bases[name] = factor(name, weights[name])
    if distributed.num_processes() > 1:
        for number, name in enumerate(names):
            bases[name] = _broadcast(bases.get(name), weights[name], number % distributed.num_processes())
    return {name: bases[name] for name in names}


def _broadcast(basis: FactorBasis | None, weight: torch.Tensor, source: int) -> FactorBasis:
    """Return the basis of a weight that the process with index `source` has computed."""
    rows, columns = weight.shape
    rank = torch.tensor(
        [0 if basis is None else basis.max_rank, int(basis is not None and basis.output_scale is not None)],
        device=weight.device,
    )
    distributed.broadcast([rank], source)
    count, scaled = rank.tolist()
    if basis is None:
        vector = partial(torch.empty, count, dtype=torch.float64, device=weight.device)
        left, right = weight.new_empty(rows, count).float(), weight.new_empty(count, columns).float()
        basis = FactorBasis(left, right, vector(), vector() if scaled else None)
    distributed.broadcast([tensor.contiguous() for tensor in basis.tensors().values()], source)
    return basis
