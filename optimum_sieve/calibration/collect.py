r"""Collect the moments of every target layer while the model reads the calibration examples.

This module runs the model over the data; the hooks are in `backbone.hooks`, the arithmetic in `factorization.moments`.
It needs torch alone: the batches and their loss are arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import nn

from optimum_sieve.backbone.hooks import Watch, check_loss
from optimum_sieve.backbone.modes import frozen
from optimum_sieve.backbone.targets import Target, linear_weight
from optimum_sieve.factorization.moments import (
    Moments,
    accumulate_moments,
    check_finite,
    empty_moments,
    watches_outputs,
)


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from optimum_sieve.factorization.moments import TokenWeights


class CalibrationBatch(Protocol):
    """The attributes of a batch that calibration reads."""

    @property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """Masks (rows, length), nonzero at tokens, 0 at padding: one, or those of encoder and decoder."""

    @property
    def num_examples(self) -> int:
        """Number of examples in the batch."""


BatchT = TypeVar("BatchT", bound=CalibrationBatch)


def collect_moments(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[BatchT],
    loss: Callable[[nn.Module, BatchT], torch.Tensor],
    *,
    projection: str = "joint",
    num_examples: int,
    weights: Mapping[str, torch.Tensor] | None = None,
    token_weights: Mapping[str, TokenWeights] | None = None,
) -> dict[str, Moments]:
    """Run the model over `batches` and return the moments of each target by name.

    Moments are sums over tokens in float32, on the device of each weight. Up to rounding they do not depend on batching
    and padding. The parameters' `requires_grad` and the training mode are restored.

    Args:
        model (`torch.nn.Module`): The model, on its device; its targets may hold factors already.
        targets (`Sequence[Target]`): Layers to take moments of.
        batches (`Iterable`): Batches, already on the model's device.
        loss (`Callable`): Maps `(model, batch)` to the *sum* of the examples' losses; only called with gradients on for
            the joint projection.
        projection (`str`): `"joint"`, `"activation"` or `"learned"`.
        num_examples (`int`): Number of examples in all batches, which divides the sums.
        weights (`Mapping[str, torch.Tensor]`, *optional*): Weight (out, in) of each target that the moments are for.
            Default: the current one.
        token_weights (`Mapping[str, Callable]`, *optional*): Weighting of each target's tokens in joint moments, see
            [`accumulate_moments`][optimum_sieve.factorization.moments.accumulate_moments].

    Raises:
        ValueError: If a loss or a moment is not finite, or a target is never called; the message names the layer.
    """
    if weights is None:
        weights = {target.name: linear_weight(model.get_submodule(target.name)) for target in targets}
    moments = {name: empty_moments(weight, projection=projection) for name, weight in weights.items()}
    accumulate = accumulator(moments, weights, projection, scaling=1 / num_examples, token_weights=token_weights)
    names = [target.name for target in targets]
    visit_tokens(model, names, batches, loss, accumulate, gradients=projection == "joint")
    for name, collected in moments.items():
        check_finite(name, collected)
    return moments


def accumulator(
    moments: Mapping[str, Moments],
    weights: Mapping[str, torch.Tensor],
    projection: str,
    *,
    scaling: float,
    token_weights: Mapping[str, TokenWeights] | None = None,
) -> Callable[..., None]:
    """Return the callback of a [`Watch`][optimum_sieve.backbone.hooks.Watch] that adds tokens to moments.

    Args:
        moments (`Mapping[str, Moments]`): The moments by layer.
        weights (`Mapping[str, torch.Tensor]`): Weight (out, in) of each layer that the moments are for.
        projection (`str`): `"joint"`, `"activation"` or `"learned"`.
        scaling (`float`): Factor of everything that is added.
        token_weights (`Mapping[str, Callable]`, *optional*): Weighting of each layer's tokens.
    """

    def accumulate(name: str, x: torch.Tensor, g: torch.Tensor | None) -> None:
        weight = weights[name]
        accumulate_moments(
            moments[name],
            weight,
            x,
            g,
            on_outputs=watches_outputs(weight, projection),
            scaling=scaling,
            token_weights=None if token_weights is None else token_weights[name],
        )

    return accumulate


def direction_gradients(
    model: nn.Module,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    batches: Iterable[BatchT],
    loss: Callable[[nn.Module, BatchT], torch.Tensor],
) -> dict[str, torch.Tensor]:
    r"""Return the derivative of the loss by a gate on each direction of some layers, \(l_j^\top (\sum g x^\top) r_j\).

    Args:
        model (`torch.nn.Module`): The model, on its device; the layers may be pruned.
        factors (`Mapping[str, tuple]`): Left (out, directions) and right (directions, in) factors by layer name. The
            layer need not hold these directions.
        batches (`Iterable`): Batches, already on the model's device.
        loss (`Callable`): Maps `(model, batch)` to the *sum* of the examples' losses.

    Returns:
        `dict[str, torch.Tensor]`: Sums over all examples, float64 (directions,), on the CPU.

    Raises:
        ValueError: If a loss is not finite, or a layer is never called.
    """
    sums = {name: torch.zeros(right.shape[0], dtype=torch.float64) for name, (_, right) in factors.items()}

    def accumulate(name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        left, right = factors[name]
        sums[name] += ((x.float() @ right.T.float()) * (g @ left.float())).sum(dim=0).double().cpu()

    visit_tokens(model, list(factors), batches, loss, accumulate)
    for name, values in sums.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"The gradients of {name!r} must be finite, got infinity or NaN. Load in float32.")
    return sums


def visit_tokens(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[BatchT],
    loss: Callable[[nn.Module, BatchT], torch.Tensor],
    visit: Callable[..., None],
    *,
    gradients: bool = True,
) -> None:
    """Run the model over `batches` and call `visit(name, x, g)` with the tokens of every call of the named layers.

    `x` (tokens, in) are the layer's inputs in the model's dtype. `g` (tokens, out) are the gradients of the loss at its
    outputs in float32, or `None`. Padding is excluded; tokens are in the order of the batch's mask. The parameters'
    `requires_grad` and the training mode are restored.

    Args:
        model (`torch.nn.Module`): The model, on its device; the layers may be pruned.
        names (`Sequence[str]`): Module names of the layers.
        batches (`Iterable`): Batches, already on the model's device.
        loss (`Callable`): Maps `(model, batch)` to the *sum* of the examples' losses.
        visit (`Callable`): Called in the order of the forward pass or, with gradients, of the backward pass.
        gradients (`bool`): Whether to compute gradients.

    Raises:
        ValueError: If a loss is not finite, or a layer is never called; the message names it.
    """
    watch = Watch(model, names, visit, gradients=gradients)
    with frozen(model), torch.set_grad_enabled(gradients):
        for batch in batches:
            with watch.batch(batch.masks):
                value = loss(model, batch)
            check_loss(value)
            if gradients:
                (value * watch.scale).backward()  # type: ignore[no-untyped-call]
