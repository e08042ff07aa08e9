"""AdamW on named parameters: float32 copies where needed, and the state of the optimizer as tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn


if TYPE_CHECKING:
    from collections.abc import Mapping


# Gradient norm, over all parameters together, at which gradients are clipped.
MAX_NORM = 1.0
# Biases may be 0 and must still be able to change.
_LEAST_SIZE = 1e-2


class ParameterTraining:
    """Parameters trained by AdamW. Steps change float32 copies of those with lower precision.

    Args:
        parameters (`Mapping[str, torch.nn.Parameter]`): The trained parameters by name.
        scale (`float`): Loss scale, see [`loss_scale`][optimum_sieve.backbone.modes.loss_scale].
        relative (`bool`): Whether learning rates are relative to the initial root mean square of each parameter.

    Example:

        training = ParameterTraining(parameters)
        training.backward(loss)
        training.step(learning_rate=2e-4)
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, scale: float = 1.0, relative: bool = False) -> None:
        self.parameters = dict(parameters)
        self.copies: dict[str, torch.Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().float() for name, p in parameters.items()
        }
        self._scale = scale
        # AdamW changes every weight by about the learning rate.
        groups = [{"params": [copy], "size": _size(copy) if relative else 1.0} for copy in self.copies.values()]
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
        """Return the summed gradients; 0 for parameters that had none, such as those of experts without a token."""
        for copy in self.copies.values():
            if copy.grad is None:
                copy.grad = torch.zeros_like(copy)
        return [copy.grad for copy in self.copies.values() if copy.grad is not None]

    def step(self, learning_rate: float) -> None:
        """Take a step along the clipped sums of the gradients and reset them.

        Args:
            learning_rate (`float`): The learning rate.

        Raises:
            FloatingPointError: If a gradient is not finite; nothing is changed then.
        """
        for gradient in self.gradients():
            gradient.div_(self._scale)
        norm = nn.utils.clip_grad_norm_(self.copies.values(), MAX_NORM)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"a gradient norm of {norm.item()}")
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
        """Return what the next step depends on, as `<field>|<name>`: parameters, moments of AdamW, its step count."""
        tensors = {f"weight|{name}": copy for name, copy in self.copies.items()}
        for name, copy in self.copies.items():
            tensors |= {f"{field}|{name}": tensor for field, tensor in self.optimizer.state[copy].items()}
        return tensors

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set everything to what `state` returned."""
        for name, copy in self.copies.items():
            copy.data.copy_(state[f"weight|{name}"])
            moments = {field: state[f"{field}|{name}"].to(copy.device) for field in ("exp_avg", "exp_avg_sq")}
            # AdamW keeps its step count on the CPU.
            self.optimizer.state[copy] = {"step": state[f"step|{name}"], **moments}
        self._round()

    def _round(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.copies[name] is not parameter:
                    parameter.copy_(self.copies[name])


def _size(tensor: torch.Tensor) -> float:
    return max(float(tensor.detach().square().mean().sqrt()), _LEAST_SIZE)
