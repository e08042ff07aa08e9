r"""Collect the moments of every target layer while the model reads the calibration examples.

The pass over the data is here; the hooks are in `watching`, the arithmetic in `moments`. Needs torch alone: what a
batch is and how its loss is computed are arguments.
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
    """What calibration reads of a batch: the masks that tell tokens from padding, and the number of examples."""

    @property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """Masks (rows, length), nonzero at tokens: one, or those of encoder and decoder, of different lengths."""

    @property
    def num_examples(self) -> int:
        """Examples in the batch."""


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

    Sums are over tokens and independent of how the examples are batched and padded, up to rounding. They are held in
    float32 on the device of each weight. Parameters' `requires_grad` and the training mode are restored.

    Args:
        model (`torch.nn.Module`): The model, on its device; its targets may hold factors already.
        targets (`Sequence[Target]`): Layers to watch.
        batches (`Iterable`): Batches, already on the model's device.
        loss (`Callable`): Maps `(model, batch)` to the *sum* of the examples' losses; only called with gradients on for
            the joint projection.
        projection (`str`): `"joint"`, `"activation"` or `"learned"`.
        num_examples (`int`): Examples in all batches, by which the sums are divided.
        weights (`Mapping[str, torch.Tensor]`, *optional*): Weight (out, in) of each target that the moments are for;
            `None`: the one it has now.
        token_weights (`Mapping[str, Callable]`, *optional*): How the tokens of each target are weighted in joint
            moments, see [`accumulate_moments`][optimum_sieve.factorization.moments.accumulate_moments].

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
    """Return what a [`Watch`][optimum_sieve.backbone.hooks.Watch] calls to add tokens to the moments of their layer.

    Args:
        moments (`Mapping[str, Moments]`): What is added to, by layer.
        weights (`Mapping[str, torch.Tensor]`): Weight (out, in) of each layer that the moments are for.
        projection (`str`): `"joint"`, `"activation"` or `"learned"`.
        scaling (`float`): Factor on everything that is added.
        token_weights (`Mapping[str, Callable]`, *optional*): How the tokens of each layer are weighted.
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
        factors (`Mapping[str, tuple]`): Left (out, directions) and right (directions, in) factors by layer name,
            whether the layer holds those directions or not.
        batches (`Iterable`): Batches, already on the model's device.
        loss (`Callable`): Maps `(model, batch)` to the *sum* of the examples' losses.

    Returns:
        `dict[str, torch.Tensor]`: Summed over all examples, float64 (directions,), on the CPU.

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
    """Run the model over `batches`; `visit(name, x, g)` sees the tokens of every call of the named layers.

    `x` (tokens, in) are a layer's inputs in the model's dtype, and `g` (tokens, out), float32, gradients of the loss
    at its outputs, or `None` without gradients. Padding is left out; tokens are in the order of the batch's mask.
    Parameters' `requires_grad` and the training mode are restored.

    Args:
        model (`torch.nn.Module`): The model, on its device; the layers may be pruned.
        names (`Sequence[str]`): Module names of the layers.
        batches (`Iterable`): Batches, already on the model's device.
        loss (`Callable`): Maps `(model, batch)` to the *sum* of the examples' losses.
        visit (`Callable`): Called as the layers are reached, backward through the model where gradients are taken.
        gradients (`bool`): Whether gradients are taken.

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
