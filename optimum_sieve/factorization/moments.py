r"""Accumulate second moments of a linear layer's inputs, outputs and output gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    TokenWeights = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Moments:
    r"""Moments of one linear layer `y = W x` over the calibration tokens, in the smaller of its two dimensions.

    \(W\) has shape (m, n), \(k = \min(m, n)\), and \(g\) is the gradient of an example's loss with respect to \(y\),
    which excludes the bias. \(E\) is the sum over tokens divided by the number of examples:

    | | `m <= n` (wide, square) | `m > n` (tall) |
    |---|---|---|
    | `activation` (k, k) | \(E[a\, y y^\top]\) | \(E[a\, x x^\top]\) |
    | `gradient` (k, k) | \(E[b\, g g^\top]\) | \(E[b\, (W^\top g)(W^\top g)^\top]\) |

    The token weights \(a\) and \(b\) are \(|g|^2\) and \(|x|^2\), or come from the factors of an earlier round (see
    `FactorBasis.token_weights`). Without gradients \(a = 1\).

    Args:
        activation (`torch.Tensor`): Second moment of the activations; (n, n) for the learned projection.
        gradient (`torch.Tensor`, *optional*): Second moment of the output gradients.
        scale (`torch.Tensor`, 0-d): \(E[|g|^2 |x|^2]\), or \(E[|x|^2]\) without gradients.
        activation_trace (`torch.Tensor`, 0-d): \(E[a\,|x|^2]\).
        gradient_trace (`torch.Tensor`, 0-d): \(E[b\,|g|^2]\); 0 without gradients.
    """

    activation: torch.Tensor
    gradient: torch.Tensor | None
    scale: torch.Tensor
    activation_trace: torch.Tensor
    gradient_trace: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are set, by field name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Moments:
        """Rebuild the moments from `tensors()`."""
        values: dict[str, Any] = {"gradient": None, **tensors}
        return cls(**values)


def weighted_sum(parts: Iterable[tuple[float, dict[str, Moments]]]) -> dict[str, Moments]:
    """Return the weighted sum of the moments of each layer over `parts`, in place of the first part.

    If the weights sum to 1, these are the moments of a mixture: a weight is the probability that an example comes from
    that part.

    Args:
        parts (`Iterable`): Weight and moments by layer of each part, overwritten. Read lazily; at most two are in
            memory.
    """
    total: dict[str, Moments] = {}
    for weight, moments in parts:
        for name, layer_moments in moments.items():
            for field, tensor in layer_moments.tensors().items():
                if name in total:
                    getattr(total[name], field).add_(tensor, alpha=weight)
                else:
                    tensor.mul_(weight)
        total = total or moments
    return total


def watches_outputs(weight: torch.Tensor, projection: str) -> bool:
    """Return whether activation moments are over `y` (wide and square layers) or `x` (tall layers, adapters)."""
    return projection != "learned" and weight.shape[0] <= weight.shape[1]


def empty_moments(weight: torch.Tensor, *, projection: str, dtype: torch.dtype = torch.float32) -> Moments:
    """Return zero moments for a layer with this `weight` (out, in), on its device."""
    size = weight.shape[0] if watches_outputs(weight, projection) else weight.shape[1]
    zeros = partial(torch.zeros, dtype=dtype, device=weight.device)
    gradient = zeros(size, size) if projection == "joint" else None
    return Moments(zeros(size, size), gradient, zeros(()), zeros(()), zeros(()))


def accumulate_moments(
    moments: Moments,
    weight: torch.Tensor,
    x: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    on_outputs: bool,
    scaling: float = 1.0,
    token_weights: TokenWeights | None = None,
) -> None:
    """Add tokens to `moments`, in place.

    Args:
        moments (`Moments`): From `empty_moments`; its dtype is the dtype of the sums.
        weight (`torch.Tensor` of shape `(out_features, in_features)`): The weight.
        x (`torch.Tensor` of shape `(tokens, in_features)`): Inputs.
        g (`torch.Tensor` of shape `(tokens, out_features)`, *optional*): Gradients of the loss with respect to the
            outputs.
        on_outputs (`bool`): Whether the moments are over the outputs; see `watches_outputs`.
        scaling (`float`): Factor on all sums: 1 / number of examples.
        token_weights (`Callable`, *optional*): Maps `x` and `g`, in the dtype of `moments`, to the token weights of
            `activation` and `gradient`, both (tokens,). Default: the squared norms of `g` and `x`.
    """
    dtype = moments.activation.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    side = x @ weight.T if on_outputs else x
    x_square = x.square().sum(dim=1)
    if g is None or moments.gradient is None:
        _add(moments.activation, side, None, scaling)
        for sums in (moments.scale, moments.activation_trace):
            sums.add_(x_square.sum(), alpha=scaling)
        return
    g = g.to(dtype)
    g_square = g.square().sum(dim=1)
    activation_weights, gradient_weights = (g_square, x_square) if token_weights is None else token_weights(x, g)
    _add(moments.activation, side, activation_weights, scaling)
    _add(moments.gradient, g if on_outputs else g @ weight, gradient_weights, scaling)
    moments.scale.add_(g_square @ x_square, alpha=scaling)
    moments.activation_trace.add_(activation_weights @ x_square, alpha=scaling)
    moments.gradient_trace.add_(gradient_weights @ g_square, alpha=scaling)


def _add(moment: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None, scaling: float) -> None:
    """Add the weighted sum of outer products of `rows` (tokens, k)."""
    weighted = rows if weights is None else rows * weights[:, None]
    moment.addmm_(weighted.T, rows, alpha=scaling)


def check_finite(name: str, moments: Moments) -> None:
    """Raise `ValueError` naming the layer if a moment is not finite."""
    for field, tensor in moments.tensors().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"The {field} moment of `{name}` must be finite, got NaN or infinity. "
                "Check the model's weights, or calibrate in float32."
            )
