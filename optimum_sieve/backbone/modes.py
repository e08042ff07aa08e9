"""Context managers for a model's training mode and gradients."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run `model` in evaluation mode without gradients; restore every module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: tensors cached in the model (rotary frequencies) must remain usable by autograd.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def loss_scale(tensors: Iterable[torch.Tensor]) -> float:
    """Return the loss scale: float16 gradients below 6e-8 would underflow. Divide gradients by it in float32."""
    return 1024.0 if any(tensor.dtype == torch.float16 for tensor in tensors) else 1.0


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Run `model` in evaluation mode with frozen parameters; restore both afterwards."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    try:
        model.requires_grad_(False)
        model.eval()
        yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for module, mode in training:
            module.training = mode
