"""A model's modes while it is read from."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from collections.abc import Iterator

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
