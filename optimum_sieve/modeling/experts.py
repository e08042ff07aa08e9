"""Mixtures of experts whose experts are separate linears. Saved with the weights of a pruned model.

transformers fuses the experts of a layer into two tensors, which have no linear layer to replace. Here every expert has
three linears, so each gets its own rank, and an expert that never receives a token of the task can be removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .layers import FactorizedLinear


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Expert(nn.Module):
    """One gated expert. Its layer names differ from those of transformers, which would fuse them on loading."""

    def __init__(self, hidden_size: int, intermediate_size: int, act_fn: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False, **options)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False, **options)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False, **options)
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` (tokens, hidden_size) to the same shape."""
        output: torch.Tensor = self.down(self.act_fn(self.gate(x)) * self.up(x))
        return output


class SeparateExperts(nn.ModuleList):
    """The experts of one layer as separate modules; replaces the module that holds them in two tensors.

    Args:
        fused (`torch.nn.Module`): That module, see [`is_fused`]. Its tensors are replaced by empty ones.
    """

    def __init__(self, fused: nn.Module) -> None:
        module: Any = fused
        gate_up, down = module.gate_up_proj, module.down_proj
        _, hidden_size, intermediate_size = down.shape
        options = {"device": gate_up.device, "dtype": gate_up.dtype}
        super().__init__(Expert(hidden_size, intermediate_size, module.act_fn, **options) for _ in gate_up)
        with torch.no_grad():
            for linears, weights in zip(self.linears(), expert_weights(fused), strict=True):
                for linear, weight in zip(linears, weights, strict=True):
                    linear.weight.copy_(weight)
        self.requires_grad_(gate_up.requires_grad).train(fused.training)
        for name, parameter in (("gate_up_proj", gate_up), ("down_proj", down)):
            setattr(fused, name, nn.Parameter(torch.empty_like(parameter, device="meta")))
        # In a list, so that it is not registered as a submodule.
        self._fused = [module]

    def linears(self) -> Iterator[tuple[nn.Linear, nn.Linear, nn.Linear]]:
        """Yield the gate, up and down layers of each expert."""
        expert: Any
        for expert in self:
            yield expert.gate, expert.up, expert.down

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the outputs of the experts that each token is routed to.

        Args:
            hidden_states (`torch.Tensor` of shape `(tokens, hidden_size)`): Inputs.
            top_k_index (`torch.Tensor` of shape `(tokens, k)`): Experts of each token; a number past the last expert
                means none.
            top_k_weights (`torch.Tensor` of shape `(tokens, k)`): Their weights.
        """
        output = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            tokens, slots = torch.where(top_k_index == index)
            if tokens.numel():
                weighted = expert(hidden_states[tokens]) * top_k_weights[tokens, slots, None]
                output.index_add_(0, tokens, weighted.to(output.dtype))
        return output

    def fuse(self) -> nn.Module:
        """Return the fused module again, with the weights of the linears, none of which may be factorized."""
        fused: nn.Module = self._fused[0]
        experts: list[Any] = list(self)
        required = experts[0].down.weight.requires_grad
        gate_up = [torch.cat([expert.gate.weight, expert.up.weight]) for expert in experts]
        for name, weights in (("gate_up_proj", gate_up), ("down_proj", [expert.down.weight for expert in experts])):
            setattr(fused, name, nn.Parameter(torch.stack(weights).detach(), requires_grad=required))
        return fused


def expert_weights(fused: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield the weights of the gate, up and down layers of each fused expert: slices of its tensors, detached."""
    for gate_up, down in zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True):
        gate, up = gate_up.chunk(2)
        yield gate, up, down


def is_fused(module: Any) -> bool:
    """Tell whether `module` holds gated experts in two plain tensors that separate linears can replace."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter) and gate_up.ndim == down.ndim == 3):
        return False
    # The decorator of transformers' expert classes sets these; a class may override the method of the gate.
    flags = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    return (
        all(getattr(module, name, None) is value for name, value in flags.items())
        # Later versions of transformers set it.
        and not getattr(module, "has_post_expert_norm", False)
        and getattr(type(module)._apply_gate, "__name__", "") == "_default_apply_gate"
        and gate_up.is_floating_point()
        and hasattr(module, "act_fn")
        and gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
    )


def separate_experts(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Replace fused experts with [`SeparateExperts`].

    Args:
        model (`torch.nn.Module`): Changed in place.
        names (`Sequence[str]`, *optional*): Modules to replace. Default: all fused experts.

    Raises:
        ValueError: If a name is not that of fused experts.
    """
    modules = dict(model.named_modules())
    for name in [name for name, module in modules.items() if is_fused(module)] if names is None else names:
        module = modules.get(name)
        # A head that builds its trunk with `AutoModel.from_config` has separated them.
        if isinstance(module, SeparateExperts):
            continue
        if module is None or not is_fused(module):
            raise ValueError(
                f"`separate_experts` must name experts of {type(model).__name__}, got {name!r}. Save the model again "
                "with its `save_pretrained`, or install the version of transformers it was saved with."
            )
        model.set_submodule(name, SeparateExperts(module))


def fuse_dense_experts(model: nn.Module) -> None:
    """Fuse [`SeparateExperts`] again where no expert is factorized, as fused ones are faster."""
    for name, module in list(model.named_modules()):
        is_dense = not any(isinstance(child, FactorizedLinear) for child in module.modules())
        if isinstance(module, SeparateExperts) and is_dense:
            model.set_submodule(name, module.fuse())


def separate_names(model: nn.Module) -> list[str]:
    """Return the names of the [`SeparateExperts`] of a model."""
    return [name for name, module in model.named_modules() if isinstance(module, SeparateExperts)]
