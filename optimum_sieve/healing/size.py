"""A healed size: the layers that a model holds at it, as they are trained and as they are saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from optimum_sieve.factorization.closed_form import FactorBasis
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.surgery.apply import factorized_layer


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from optimum_sieve.training.steps import Training


@dataclass(frozen=True, kw_only=True, eq=False)
class HealedSize:
    """One size of a descent.

    Args:
        kept (`float`): Fraction of the targets' parameters that the ranks keep.
        asked (`float`): Fraction that was asked for.
        key (`str`): Hash of everything that the size depends on.
        factors (`dict[str, FactorizedLinear]`): Trained plain factors by target; dense targets are absent.
        layers (`dict[str, FactorizedLinear]`): The same weights in the storage they are saved in.
        norms (`Mapping[str, torch.Tensor]`): Trained weights of normalization layers by parameter name.
        healing (`Training`): Figures of the training.
    """

    kept: float
    asked: float
    key: str
    factors: dict[str, FactorizedLinear]
    layers: dict[str, FactorizedLinear]
    norms: Mapping[str, torch.Tensor]
    healing: Training

    def take(self, name: str) -> FactorizedLinear | None:
        """Remove a target and return its plain factors, `None` for a dense one."""
        self.layers.pop(name, None)
        return self.factors.pop(name, None)

    def ranks(self, names: Iterable[str]) -> dict[str, int | None]:
        """Return the rank of every target called `names`, `None` for a dense one."""
        return {name: self.layers[name].rank if name in self.layers else None for name in names}


def plain_layer(
    left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor
) -> FactorizedLinear:
    """Make a layer of plain factors (out, rank) and (rank, in) with the dtype and device of the tensor `like`."""
    bias = None if bias is None else bias.detach()
    return FactorizedLinear.from_factors(left, right, bias, dtype=like.dtype).to(like.device).eval()


def stored_layer(layer: FactorizedLinear, storage: str) -> FactorizedLinear:
    """Return a layer that holds the weight of plain factors in another storage.

    Pivoted storage falls back to plain factors if its coefficients would be too large, and at rank 0.
    """
    if storage == "factors" or not layer.rank:
        return layer
    left, right = layer.factors()
    basis = FactorBasis(left, right, torch.zeros(layer.rank, dtype=torch.float64))
    dtype = layer.first.weight.dtype
    made = factorized_layer(basis, layer.rank, storage=storage, bias=layer.bias, dtype=dtype)
    return layer if made is None else made.to(left.device).eval()
