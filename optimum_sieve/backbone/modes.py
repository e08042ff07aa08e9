"""A model's modes while it is read from."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from optimum_sieve.healing.optimizer import _checkpointed


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import nn
    from transformers import PreTrainedModel


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


@contextmanager
def training_only(
    model: PreTrainedModel, parameters: Mapping[str, nn.Parameter], *, checkpointing: bool
) -> Iterator[None]:
    """Let gradients reach `parameters` alone, without dropout; flags, modes and, on an error, weights are restored."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.requires_grad_(False)
        model.eval()  # type: ignore[no-untyped-call]
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad(), _checkpointed(model) if checkpointing else nullcontext():
            yield
    except BaseException:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
        raise
    finally:
        for parameter, flag in required:
            parameter.grad = None
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


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
