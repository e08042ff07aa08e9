"""Access weights that accelerate offloads to disk or CPU memory until a layer is called."""

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
    """Return whether the module's direct parameters are offloaded."""
    return bool(has_offloaded_params(module))


def holds_offloaded(model: nn.Module) -> bool:
    """Return whether any part of the model is offloaded."""
    return any(is_offloaded(module) for module in model.modules())


@contextmanager
def loaded(module: nn.Module) -> Iterator[nn.Module]:
    """Load a module's direct parameters inside the context; tensors read from it remain valid afterwards."""
    with align_module_device(module):
        yield module


def execution_device(module: nn.Module) -> torch.device:
    """Return the device a module computes on."""
    if is_offloaded(module):
        hook: Any = module._hf_hook
        return torch.device(hook.execution_device)
    return next(module.parameters()).device


def bring_in(model: nn.Module) -> None:
    """Load all offloaded parameters and remove the offloading hooks, in place."""
    if getattr(model, "hf_device_map", None) is None:
        return
    for module in model.modules():
        if is_offloaded(module):
            with loaded(module):
                tensors = {name: value.detach().clone() for name, value in module.named_parameters(recurse=False)}
            remove_hook_from_module(module)
            for name, tensor in tensors.items():
                setattr(module, name, nn.Parameter(tensor, requires_grad=getattr(module, name).requires_grad))
    if len({parameter.device for parameter in model.parameters()}) == 1:
        # Hooks that move tensors between devices are no longer needed.
        remove_hook_from_module(model, recurse=True)
        del model.hf_device_map
