r"""Second moments of the inputs, outputs and output gradients of a linear layer, and how tokens are added to them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass
class Moments:
    r"""Moments of one linear layer `y = W x` over the calibration tokens, on its smaller side.

    With \(g\) the gradient of an example's loss with respect to \(y\), all sums over tokens divided by the number of
    examples, and \(k = \min(m, n)\):

    | | `m <= n` (wide, square) | `m > n` (tall) |
    |---|---|---|
    | `activation` (k, k) | \(E[w\, y y^\top]\) | \(E[w\, x x^\top]\) |
    | `gradient` (k, k) | \(E[|x|^2 g g^\top]\) | \(E[|x|^2 (W^\top g)(W^\top g)^\top]\) |

    where the token weight \(w\) is \(|g|^2\) for the joint projection and 1 without gradients. \(y\) excludes the bias.

    Args:
        activation (`torch.Tensor`): Second moment of the activations; always (n, n) for the learned projection.
        gradient (`torch.Tensor`, *optional*): Second moment of the output gradients.
        scale (`torch.Tensor`, 0-d): \(E[w\,|x|^2]\).
    """

    activation: torch.Tensor
    gradient: torch.Tensor | None
    scale: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are present, by field name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Moments:
        """Rebuild from `tensors()`."""
        values: dict[str, Any] = {"gradient": None, **tensors}
        return cls(**values)


def weighted_sum(parts: Iterable[tuple[float, dict[str, Moments]]]) -> dict[str, Moments]:
    """Return the moments of each layer summed over parts with their weights; the parts are overwritten.

    With weights that add up to 1 the sum has the moments of a mixture, in which a weight is the probability that an
    example is of that part.

    Args:
        parts (`Iterable`): Weight and moments by layer of each part; read one by one, so two are held at once.
    """
    total: dict[str, Moments] = {}
    for weight, moments in parts:
        for name, own in moments.items():
            for field, tensor in own.tensors().items():
                if name in total:
                    getattr(total[name], field).add_(tensor, alpha=weight)
                else:
                    tensor.mul_(weight)
        total = total or moments
    return total


def watches_outputs(weight: torch.Tensor, projection: str) -> bool:
    """Tell whether the moments are those of `y` (wide and square layers) or of `x` (tall ones, and adapters)."""
    return projection != "learned" and weight.shape[0] <= weight.shape[1]


def empty_moments(weight: torch.Tensor, *, projection: str, dtype: torch.dtype = torch.float32) -> Moments:
    """Return zero moments for a layer with this `weight` (out, in), on its device."""
    size = weight.shape[0] if watches_outputs(weight, projection) else weight.shape[1]
    zeros = partial(torch.zeros, dtype=dtype, device=weight.device)
    gradient = zeros(size, size) if projection == "joint" else None
    return Moments(zeros(size, size), gradient, zeros(()))


def accumulate_moments(
    moments: Moments,
    weight: torch.Tensor,
    x: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    on_outputs: bool,
    scaling: float = 1.0,
) -> None:
    """Add tokens to `moments`, in place.

    Args:
        moments (`Moments`): From `empty_moments`; its dtype is the dtype of the sums.
        weight (`torch.Tensor` of shape `(out_features, in_features)`): The weight.
        x (`torch.Tensor` of shape `(tokens, in_features)`): Inputs.
        g (`torch.Tensor` of shape `(tokens, out_features)`, *optional*): Gradients of the loss at the outputs.
        on_outputs (`bool`): Whether the moments are those of the outputs; see `watches_outputs`.
        scaling (`float`): Factor on everything added (one over the number of examples).
    """
    dtype = moments.activation.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    side = x @ weight.T if on_outputs else x
    x_square = x.square().sum(dim=1)
    token_weight = torch.ones_like(x_square) if g is None else g.to(dtype).square().sum(dim=1)
    weighted = side * token_weight[:, None]
    moments.activation.addmm_(weighted.T, side, alpha=scaling)
    moments.scale.add_((token_weight * x_square).sum(), alpha=scaling)
    if g is not None and moments.gradient is not None:
        back = g.to(dtype) if on_outputs else g.to(dtype) @ weight
        moments.gradient.addmm_((back * x_square[:, None]).T, back, alpha=scaling)


def check_finite(name: str, moments: Moments) -> None:
    """Raise a `ValueError` that names the layer if a moment is not finite."""
    for field, tensor in moments.tensors().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"The {field} moment of `{name}` must be finite, got NaN or infinity. "
                "Check the model's weights, or calibrate in float32."
            )
