"""Replace linear layers with low-rank factors, and undo it. Needs torch, and SciPy for the pivots."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import scipy.linalg
import torch
from torch import nn

from optimum_sieve.allocation.budget import rank_parameters
from optimum_sieve.backbone.offloading import loaded
from optimum_sieve.backbone.targets import linear_weight
from optimum_sieve.modeling.layers import FactorizedLinear


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from optimum_sieve.factorization.closed_form import FactorBasis


logger = logging.getLogger(__name__)

# Larger coefficients visibly amplify the rounding of the pivots in bfloat16 (8 bits of mantissa).
MAX_COEFFICIENT = 32.0


@dataclass(frozen=True)
class Pivots:
    """Rows of a weight that combine into its other rows.

    Args:
        rows (`torch.Tensor` of shape `(rank,)`): Indices of the kept rows.
        coefficients (`torch.Tensor` of shape `(out_features - rank, rank)`): Float64; they combine the kept rows into
            the others, in ascending order.
        row_order (`torch.Tensor` of shape `(out_features,)`): Position of each row in the kept rows followed by the
            others.
    """

    rows: torch.Tensor
    coefficients: torch.Tensor
    row_order: torch.Tensor

    @property
    def max_coefficient(self) -> float:
        """Largest absolute coefficient; usually 1 to 10. Large values lose precision."""
        return float(self.coefficients.abs().max()) if self.coefficients.numel() else 0.0


def choose_pivots(left: torch.Tensor) -> Pivots:
    r"""Choose `rank` rows of `left @ right` that span the others, by QR with column pivoting.

    Args:
        left (`torch.Tensor` of shape `(out_features, rank)`): Left factor. Only its column space matters: pivoting an
            orthonormal basis of it keeps the coefficients small at any scale of the columns.

    Returns:
        [`Pivots`]: On the CPU.

    Reference: Cheng, Gimbutas, Martinsson and Rokhlin (2005), *On the compression of low rank matrices*.
    """
    rows, rank = left.shape
    basis = torch.linalg.qr(left.double().cpu()).Q
    triangle, order = scipy.linalg.qr(basis.T.numpy(), mode="r", pivoting=True)
    coefficients = scipy.linalg.solve_triangular(triangle[:, :rank], triangle[:, rank:]).T
    pivots, others = torch.as_tensor(order[:rank]).long(), torch.as_tensor(order[rank:]).long()
    ascending = torch.argsort(others)
    row_order = torch.empty(rows, dtype=torch.int32)
    row_order[pivots] = torch.arange(rank, dtype=torch.int32)
    row_order[others[ascending]] = torch.arange(rank, rows, dtype=torch.int32)
    return Pivots(pivots, torch.as_tensor(coefficients.copy())[ascending], row_order)


def factorized_layer(
    basis: FactorBasis,
    rank: int,
    *,
    storage: str = "pivoted",
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> FactorizedLinear | None:
    """Make the layer that holds the first `rank` directions of `basis`.

    Pivoted storage falls back to factors if coefficients exceed `MAX_COEFFICIENT`, and to `None` (the layer stays
    dense) if factors would not be smaller than the dense weight.
    """
    left, right = basis.truncate(rank)
    if storage == "pivoted" and rank:
        pivots = choose_pivots(left)
        if pivots.max_coefficient <= MAX_COEFFICIENT:
            rows = (left.double()[pivots.rows.to(left.device)] @ right.double()).float()
            coefficients, order = pivots.coefficients.to(rows), pivots.row_order.to(left.device)
            bias = None if bias is None else bias.detach().to(rows)
            return FactorizedLinear.from_pivots(rows, coefficients, order, bias, dtype=dtype)
        out_features, in_features = left.shape[0], right.shape[1]
        if rank_parameters(rank, out_features, in_features, "factors") >= out_features * in_features:
            return None
    return FactorizedLinear.from_factors(left, right, bias, dtype=dtype)


def apply_ranks(
    model: nn.Module, bases: Mapping[str, FactorBasis], ranks: Mapping[str, int | None], *, storage: str = "pivoted"
) -> dict[str, nn.Module]:
    """Replace the layers named in `ranks` (`None`: stays dense) with factorized ones, in place; all of them or none.

    Returns:
        `dict[str, torch.nn.Module]`: The dense layers that were replaced, by name, for `restore`.

    Raises:
        KeyError: If a name is not in `bases`.
    """
    chosen = {name: rank for name, rank in ranks.items() if rank is not None}
    layers = {
        name: _replacement(model.get_submodule(name), bases[name], rank, storage) for name, rank in chosen.items()
    }
    fallen_back = [n for n, layer in layers.items() if chosen[n] and (layer is None or layer.storage != storage)]
    if fallen_back:
        logger.warning(
            "%d of %d pivoted layers have coefficients above %g and are held as factors, or dense: %s.",
            len(fallen_back), len(layers), MAX_COEFFICIENT, ", ".join(fallen_back[:5]),
        )  # fmt: skip
    replaced: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        if layer is not None:
            replaced[name] = model.get_submodule(name)
            model.set_submodule(name, layer)
    return replaced


def _replacement(dense: nn.Module, basis: FactorBasis, rank: int, storage: str) -> FactorizedLinear | None:
    with loaded(dense):
        # First, and another tensor: `linear_weight` offloads the layer's own parameters again.
        bias = dense.bias.detach() if isinstance(dense.bias, torch.Tensor) else None
        weight = linear_weight(dense)
    layer = factorized_layer(basis, rank, storage=storage, bias=bias, dtype=weight.dtype)
    return None if layer is None else layer.to(weight.device).train(dense.training)


def restore(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put `layers` back into the model, by name."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)


@contextmanager
def truncated(
    model: nn.Module, bases: Mapping[str, FactorBasis], ranks: Mapping[str, int | None], *, storage: str = "pivoted"
) -> Iterator[nn.Module]:
    """Apply `ranks` to `model` inside the context and restore its dense layers on exit, also after an error."""
    replaced = apply_ranks(model, bases, ranks, storage=storage)
    try:
        yield model
    finally:
        restore(model, replaced)


def largest_coefficient(model: nn.Module) -> float | None:
    """Return the largest absolute coefficient of the pivoted layers in `model`; `None` if it has none.

    Larger coefficients pass on more of the rounding of the kept rows to the others; see `MAX_COEFFICIENT`.
    """
    coefficients = (module.coefficients for module in model.modules() if isinstance(module, FactorizedLinear))
    return max((float(c.detach().abs().max()) for c in coefficients if c is not None and c.numel()), default=None)
