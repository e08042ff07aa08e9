"""The trained factors of a pruned model: float32 copies where needed, and the state of the optimizer as tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from optimum_sieve.backbone.modes import loss_scale
from optimum_sieve.modeling.layers import FactorizedLinear
from optimum_sieve.surgery.factors import factors_of, layer_like, truncate_product


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


# Gradient norm, over all factors together, at which gradients are clipped.
MAX_NORM = 1.0
# Biases may be 0 and must still be able to change.
_LEAST_SIZE = 1e-2


def trained_parameters(model: nn.Module, *, norms: bool = False) -> dict[str, nn.Parameter]:
    """Return the factors and biases of every factorized layer by name; with `norms` the normalization weights too.

    Raises:
        ValueError: If the model has no factorized layer.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)]
    if not layers:
        raise ValueError("`model` must have factorized layers to heal, got none. Prune it first.")
    return _inside(model, layers) | (norm_parameters(model) if norms else {})


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


class FactorTraining:
    """Parameters trained by AdamW. Steps change float32 copies of those with lower precision.

    Args:
        parameters (`Mapping[str, torch.nn.Parameter]`): The trained parameters by name.

    Example:

        training = FactorTraining(parameters)
        training.backward(loss)
        training.step(learning_rate=2e-4)
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.copies: dict[str, torch.Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().float() for name, p in parameters.items()
        }
        self._scale = loss_scale(parameters.values())
        # AdamW changes every weight by about the learning rate; factors differ in scale.
        groups = [{"params": [copy], "size": max(float(copy.detach().square().mean().sqrt()), _LEAST_SIZE)}
                  for copy in self.copies.values()]  # fmt: skip
        # Every step sets its learning rate.
        self.optimizer = torch.optim.AdamW(groups or [{"params": []}], lr=0.0, weight_decay=0.0)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` to the sums. Behind layers of rank 0 it may depend on no parameter."""
        if not loss.requires_grad:
            return
        (loss * self._scale).backward()  # type: ignore[no-untyped-call]
        for name, parameter in self.parameters.items():
            copy = self.copies[name]
            if copy is not parameter and parameter.grad is not None:
                gradient = parameter.grad.float()
                copy.grad = gradient if copy.grad is None else copy.grad + gradient
                parameter.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """Return the summed gradients, 0 for parameters that had none."""
        for copy in self.copies.values():
            if copy.grad is None:
                copy.grad = torch.zeros_like(copy)
        return [copy.grad for copy in self.copies.values() if copy.grad is not None]

    def step(self, learning_rate: float) -> None:
        """Take a step along the clipped sums of the gradients and reset them.

        Args:
            learning_rate (`float`): Learning rate relative to the initial root mean square of each parameter.

        Raises:
            ValueError: If a gradient is not finite; nothing is changed then.
        """
        for gradient in self.gradients():
            gradient.div_(self._scale)
        norm = nn.utils.clip_grad_norm_(self.copies.values(), MAX_NORM)
        if not torch.isfinite(norm):
            raise ValueError(
                f"The gradients of healing must be finite, got a norm of {norm.item()}. Lower `heal.learning_rate`, or "
                "load the model in bfloat16 or float32."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["size"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._round()

    def values(self) -> dict[str, torch.Tensor]:
        """Return copies of the model's parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def assign(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set the model's parameters to `values`."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything that the next step depends on: parameters, both moments of AdamW and its step count."""
        return training_state(self.copies, self.optimizer)

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set everything to what `state` returned."""
        restore_training(self.copies, self.optimizer, state)
        self._round()

    def _round(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.copies[name] is not parameter:
                    parameter.copy_(self.copies[name])


def training_state(parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """Return trained parameters with both moments of AdamW and its step count, as `<field>|<name>`."""
    tensors = {f"weight|{name}": parameter for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{field}|{name}": tensor for field, tensor in optimizer.state[parameter].items()}
    return tensors


def restore_training(
    parameters: Mapping[str, torch.Tensor], optimizer: torch.optim.AdamW, state: Mapping[str, torch.Tensor]
) -> None:
    """Set parameters and optimizer to what [`training_state`] returned."""
    for name, parameter in parameters.items():
        parameter.data.copy_(state[f"weight|{name}"])
        moments = {field: state[f"{field}|{name}"].to(parameter.device) for field in ("exp_avg", "exp_avg_sq")}
        # AdamW keeps its step count on the CPU.
        optimizer.state[parameter] = {"step": state[f"step|{name}"], **moments}
