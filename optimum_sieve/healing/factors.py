"""What healing trains of a pruned model: its factors or adapters of them, and normalization weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.surgery.factors import factors_of, layer_like, truncate_product


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


def trained_parameters(model: nn.Module, *, norms: bool = False) -> dict[str, nn.Parameter]:
    """Return the factors and biases of every factorized layer by name; with `norms` the normalization weights too.

    Raises:
        ValueError: If the model has no factorized layer.
    """
    return _inside(model, list(_factorized(model))) | (norm_parameters(model) if norms else {})


def factor_names(model: nn.Module) -> list[str]:
    """Return the names of both factors, `nn.Linear` layers, of every factorized layer with a rank above 0.

    Raises:
        ValueError: If the model has no factorized layer.
    """
    return [
        f"{name}.{child}" for name, layer in _factorized(model).items() if layer.rank for child in layer.child_names
    ]


def _factorized(model: nn.Module) -> dict[str, FactorizedLinear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}
    if not layers:
        raise ValueError("`model` must have factorized layers to heal, got none. Prune it first.")
    return layers


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of every normalization layer by name."""
    return _inside(model, [name for name, module in model.named_modules() if "Norm" in type(module).__name__])


def _inside(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the parameters that have elements (factors of rank 0 have none) of the modules called `names`."""
    owners = tuple(f"{name}." for name in names)
    return {name: p for name, p in model.named_parameters() if name.startswith(owners) and p.numel()}


class HeldAsFactors:
    r"""Hold the pivoted layers of a model as factors \(U \sqrt S\), \(\sqrt S V^\top\) while they are trained.

    Pivots are rows of one matrix and share its large directions; the small directions, which the layer needs as well,
    are differences of rows. AdamW's steps have the same size for every entry and would swamp those differences. In the
    factors, each direction has its own scale.

    Args:
        model (`torch.nn.Module`): The model. Its pivoted layers are replaced in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._pivoted = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, FactorizedLinear) and layer.coefficients is not None
        }
        for name, held in {name: _as_factors(layer) for name, layer in self._pivoted.items()}.items():
            model.set_submodule(name, held)

    def undo(self) -> None:
        """Restore the pivoted layers."""
        for name, layer in self._pivoted.items():
            self._model.set_submodule(name, layer)

    def pivot(self) -> None:
        """Replace the factors by pivoted layers with the same product."""
        for name, layer in self._pivoted.items():
            held = self._model.get_submodule(name)
            assert isinstance(held, FactorizedLinear)
            bias = None if held.bias is None else held.bias.detach()
            self._model.set_submodule(name, layer_like(layer, *factors_of(held), bias))


def _as_factors(layer: FactorizedLinear) -> FactorizedLinear:
    left, right = truncate_product(*factors_of(layer), layer.rank)
    bias = None if layer.bias is None else layer.bias.detach()
    return FactorizedLinear.from_factors(left, right, bias, dtype=layer.first.weight.dtype).train(layer.training)
