"""Train some parameters of a model and leave all others alone."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from transformers import PreTrainedModel


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


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Store only the inputs of each transformer block; the backward pass computes its activations again.

    transformers does this only in training mode, where some models have dropout.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
