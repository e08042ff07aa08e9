"""A model's modes while it is read from."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode without gradients, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: what a forward pass caches in the model (rotary frequencies) must stay usable by autograd.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def loss_scale(tensors: Iterable[torch.Tensor]) -> float:
    """Factor of the loss, by which gradients are divided again in float32: below 6e-8, float16 ones underflow."""
    return 1024.0 if any(tensor.dtype == torch.float16 for tensor in tensors) else 1.0


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode without parameter gradients, and restore both."""
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
