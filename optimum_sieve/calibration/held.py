r"""Factor bases of the weights that a healed model holds, for the next, smaller size.

A factorized layer computes `left @ (right @ x)`. Moments are taken of `left` alone, as a linear layer of its own with
the inputs `right @ x`. They are small, (rank, rank), and `factorize` orders the directions inside the healed product.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from optimum_sieve.backbone.targets import Target, linear_weight
from optimum_sieve.factorization.closed_form import FactorBasis
from optimum_sieve.factorization.moments import weighted_sum
from optimum_sieve.modeling.layers import FactorizedLinear

from .stage import factor, moments_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from optimum_sieve.run.context import Run
    from optimum_sieve.tasks import Example


def held_bases(run: Run, gold: Sequence[Sequence[Example]]) -> dict[str, FactorBasis]:
    """Return a factor basis of the weight of every target as the model holds it now.

    Args:
        run (`Run`): The run, whose model holds plain factors (storage `"factors"`) or dense layers.
        gold (`Sequence[Sequence[Example]]`): Calibration examples of each task with the answers that the loss is taken
            of, see [`gold_examples`][optimum_sieve.calibration.stage.gold_examples].

    Returns:
        `dict[str, FactorBasis]`: By target. A factorized layer's basis has as many directions as its rank, none at 0.

    Raises:
        ValueError: If a loss or a moment is not finite.
    """
    layers = {target.name: run.model.get_submodule(target.name) for target in run.targets}
    held = {name: layer for name, layer in layers.items() if isinstance(layer, FactorizedLinear)}
    whole = run.config.projection == "svd"
    read: dict[str, Target] = {}
    weights: dict[str, torch.Tensor] = {}
    for target in run.targets:
        layer = held.get(target.name)
        if layer is None:
            read[target.name], weights[target.name] = target, linear_weight(layers[target.name])
        elif whole:
            # The SVD of one factor is not that of the product.
            read[target.name], weights[target.name] = target, layer.weight.detach()
        elif layer.rank:
            name = f"{target.name}.{layer.child_names[1]}"
            read[target.name] = replace(target, name=name, in_features=layer.rank)
            weights[target.name] = layer.last.weight.detach()
    by_module = {read[name].name: weight for name, weight in weights.items()}
    moments = {}
    if not whole:
        pairs = zip(run.tasks, gold, strict=True)
        moments = weighted_sum(
            (task.weight, moments_of(run, task, examples, list(read.values()), by_module, "moments, healed"))
            for task, examples in pairs
        )
    bases = factor(run, by_module, moments)
    return {name: _of_product(bases[read[name].name], held.get(name), whole) if name in read else _empty(held[name])
            for name in layers}  # fmt: skip


def _of_product(basis: FactorBasis, layer: FactorizedLinear | None, whole: bool) -> FactorBasis:
    """Return the basis of a layer's weight, given that of its left factor."""
    if layer is None or whole:
        return basis
    return replace(basis, right=basis.right @ layer.first.weight.detach().to(basis.right), output_scale=None)


def _empty(layer: FactorizedLinear) -> FactorBasis:
    left, right = layer.factors()
    return FactorBasis(left, right, left.new_zeros(0).double())
