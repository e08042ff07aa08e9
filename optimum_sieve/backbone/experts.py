"""A view of a model whose experts are separate linears, for planning."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from optimum_sieve.modeling.experts import SeparateExperts, expert_weights, is_fused


Module = TypeVar("Module", bound=nn.Module)


def separated_view(model: Module) -> Module:
    """Return a view of a model in which fused experts are separate linears; the model itself does not change.

    The view has the names, shapes and weights that the model has after `separate_experts`, and takes no memory: the
    weights of experts are slices of the fused tensors, and all other modules are those of the model. Do not run or
    change it.

    Args:
        model (`torch.nn.Module`): The model.

    Returns:
        `torch.nn.Module`: The view, or `model` itself if it has no fused experts.
    """
    children = {
        name: None if child is None else (_slices(child) if is_fused(child) else separated_view(child))
        for name, child in model._modules.items()
    }
    if all(children[name] is child for name, child in model._modules.items()):
        return model
    view = copy.copy(model)
    view._modules = children
    return view


def _slices(fused: nn.Module) -> SeparateExperts:
    """Make separate experts whose weights are slices of the fused tensors."""
    empty = copy.copy(fused)
    empty._parameters = {
        name: nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, parameter in fused.named_parameters(recurse=False)
    }
    experts = SeparateExperts(empty)
    for linears, weights in zip(experts.linears(), expert_weights(fused), strict=True):
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)
    return experts
