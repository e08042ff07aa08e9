"""LoRA adapters of linear layers, which stay the model's own: hooks add them to the outputs until they are merged."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from optimum_sieve.backbone.targets import linear_weight


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


# LoRA's alpha is twice the rank.
SCALE = 2.0
# Up to this rank of a weight, adding an adapter to it in every pass takes less time than adding it to the outputs: one
# more product of the weight's size replaces five with the adapter's, and passes over the outputs. Measured on a CPU.
_ADDED_TO_WEIGHTS = 128


class Adapters:
    r"""LoRA adapters \(y = W x + 2\, L R x\) of some layers, in float32, with \(L = 0\) at first.

    Args:
        model (`torch.nn.Module`): The model, which is not changed before `merge`.
        names (`Sequence[str]`): Names of its `nn.Linear` and `Conv1D` layers.
        rank (`int`): Columns of \(L\) and rows of \(R\).
        seed (`int`): Seed of the uniform values of \(R\) in \(\pm 1 / \sqrt{\text{in\_features}}\).

    Example:

        adapters = Adapters(model, names, rank=8, seed=0)
        with adapters.attached():
            ...  # Train `adapters.parameters`.
        adapters.merge()
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rank: int, seed: int) -> None:
        self._layers = {name: model.get_submodule(name) for name in names}
        self._before: dict[str, torch.Tensor] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, layer in self._layers.items():
            weight = linear_weight(layer)
            out_features, in_features = weight.shape
            # Drawn on the CPU, so that every device has the same values.
            right = (2 * torch.rand(rank, in_features, generator=generator) - 1) * in_features**-0.5
            self.parameters[f"{name}.left"] = nn.Parameter(torch.zeros(out_features, rank, device=weight.device))
            self.parameters[f"{name}.right"] = nn.Parameter(right.to(weight.device))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Add the adapters to the layers' outputs, or to small weights in each pass, inside the context."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                left, right = self._factors(name)
                # Subclasses and wrapped layers compute something else.
                if type(layer) is nn.Linear and "forward" not in vars(layer) and _is_small(layer.weight, left.dtype):
                    vars(layer)["forward"] = _with_sum(layer, left, right)
                    stack.callback(vars(layer).pop, "forward")
                else:
                    stack.callback(layer.register_forward_hook(_adding(left, right)).remove)
            yield

    def merge(self, *, keep: bool = False) -> None:
        """Add the adapters to the weights, in place; with `keep`, store the weights before for `undo`."""
        if keep:
            # In CPU memory, as only an error needs them again.
            self._before = {name: linear_weight(layer).to("cpu", copy=True) for name, layer in self._layers.items()}
        with torch.no_grad():
            for name, layer in self._layers.items():
                left, right = self._factors(name)
                weight = linear_weight(layer)
                weight.copy_(weight.float() + SCALE * left @ right)

    def undo(self) -> None:
        """Restore the weights before `merge(keep=True)`, bit for bit."""
        with torch.no_grad():
            for name, weight in self._before.items():
                linear_weight(self._layers[name]).copy_(weight)
        self._before = {}

    def values(self) -> dict[str, torch.Tensor]:
        """Return the factors of all adapters."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def assign(self, values: Mapping[str, torch.Tensor]) -> None:
        """Set the factors to what `values` returned."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def _factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.parameters[f"{name}.left"], self.parameters[f"{name}.right"]


def _is_small(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether an adapter is added to the weight; in a narrower dtype its small values would be rounded away."""
    return weight.dtype == dtype and min(weight.shape) <= _ADDED_TO_WEIGHTS


def _with_sum(layer: nn.Linear, left: nn.Parameter, right: nn.Parameter) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, torch.addmm(layer.weight, left, right, alpha=SCALE), layer.bias)

    return forward


def _adding(left: nn.Parameter, right: nn.Parameter) -> Callable[..., torch.Tensor]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        inner = SCALE * nn.functional.linear(args[0].to(right.dtype), right)
        if output.dtype != left.dtype:
            return output + nn.functional.linear(inner, left).to(output.dtype)
        # One pass over the output.
        rows = output.reshape(-1, output.shape[-1])
        return torch.addmm(rows, inner.reshape(-1, inner.shape[-1]), left.T).view(output.shape)

    return hook
