"""Weights that accelerate keeps on disk or in the CPU's memory until a layer is called."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from accelerate.utils.modeling import has_offloaded_params
from torch import nn


if TYPE_CHECKING:
    from collections.abc import Iterator


def is_offloaded(module: nn.Module) -> bool:
    """Tell whether a module's own parameters are loaded when it is called."""
    return bool(has_offloaded_params(module))


def holds_offloaded(model: nn.Module) -> bool:
    """Tell whether any part of a model is offloaded."""
    return any(is_offloaded(module) for module in model.modules())


@contextmanager
def loaded(module: nn.Module) -> Iterator[nn.Module]:
    """Hold a module's own parameters in memory inside the context; tensors taken out of it stay."""
    with align_module_device(module):
        yield module


def execution_device(module: nn.Module) -> torch.device:
    """Return where a module computes."""
    if is_offloaded(module):
        hook: Any = module._hf_hook
        return torch.device(hook.execution_device)
    return next(module.parameters()).device


def bring_in(model: nn.Module) -> None:
    """Load everything that is still offloaded, and let a model be as if nothing had been, in place."""
    places = getattr(model, "hf_device_map", None)
    if places is None:
        return
    for module in model.modules():
        if is_offloaded(module):
            with loaded(module):
                own = {name: parameter.detach().clone() for name, parameter in module.named_parameters(recurse=False)}
            remove_hook_from_module(module)
            for name, tensor in own.items():
                setattr(module, name, nn.Parameter(tensor, requires_grad=getattr(module, name).requires_grad))
    if len({parameter.device for parameter in model.parameters()}) == 1:
        # Those that move tensors between devices have nothing to do any more.
        remove_hook_from_module(model, recurse=True)
        del model.hf_device_map
