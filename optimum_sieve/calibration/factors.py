"""Factor many weights, shared among processes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from optimum_sieve.factorization.closed_form import FactorBasis
from optimum_sieve.run import distributed


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from optimum_sieve.config.sieve import SieveConfig
    from optimum_sieve.factorization.moments import TokenWeights

# See `FactorBasis.token_weights`; 0 weights tokens by their norms alone.
_WEIGHTING_POWERS = {"norms": 0.0, "balanced": 0.5, "likelihood": 1.0}


def token_weights(config: SieveConfig, bases: Mapping[str, FactorBasis]) -> dict[str, TokenWeights] | None:
    """Return how tokens are weighted by the bases of the round before; `None`: by their norms alone."""
    power = _WEIGHTING_POWERS[config.weighting]
    if not (power and bases):
        return None
    return {name: partial(basis.token_weights, power=power) for name, basis in bases.items()}


def factor_together(
    weights: Mapping[str, torch.Tensor], factor: Callable[[str, torch.Tensor], FactorBasis], *, progress: bool
) -> dict[str, FactorBasis]:
    """Factor every weight (out, in), each in one of the processes that work together; return all bases in each."""
    bases: dict[str, FactorBasis] = {}
    names = list(weights)
    for name in tqdm(distributed.share(names), desc="factors", unit="matrix", disable=not progress):
        bases[name] = factor(name, weights[name])
    if distributed.size() > 1:
        for number, name in enumerate(names):
            bases[name] = _handed_out(bases.get(name), weights[name], number % distributed.size())
    return {name: bases[name] for name in names}


def _handed_out(basis: FactorBasis | None, weight: torch.Tensor, owner: int) -> FactorBasis:
    """Return the basis that the process at `owner` has made of a weight."""
    rows, columns = weight.shape
    rank = torch.tensor(
        [0 if basis is None else basis.max_rank, int(basis is not None and basis.output_scale is not None)],
        device=weight.device,
    )
    distributed.hand_out([rank], owner)
    count, scaled = rank.tolist()
    if basis is None:
        vector = partial(torch.empty, count, dtype=torch.float64, device=weight.device)
        left, right = weight.new_empty(rows, count).float(), weight.new_empty(count, columns).float()
        basis = FactorBasis(left, right, vector(), vector() if scaled else None)
    distributed.hand_out([tensor.contiguous() for tensor in basis.tensors().values()], owner)
    return basis
