"""Where and how weights lie in memory. Travels beside the weights of a pruned model."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn


Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def copy_parameters(model: nn.Module) -> None:
    """Copy the parameters that lie on the CPU into memory of their own, in place.

    `from_pretrained` leaves them in the memory-mapped file: the first pass reads them from disk, and they may not be
    aligned there, which makes a matrix-vector product slower, on some machines several times.
    """
    for parameter in _plain_parameters(model):
        parameter.data = parameter.data.clone()


@torch.no_grad()
def lay_out_for_generation(model: Module) -> Module:
    """Lay out the linears of a float32 model on the CPU column by column, so that it generates faster.

    A linear that multiplies one row at a time reads its whole weight. Math Kernel Library takes the rows of the weight
    as dot products, which for the short rows of a second factor lasts twice as long as adding up columns
    (docs/measurements.md, "Speed"). Values, shapes and what the model computes stay the same up to rounding. Linears in
    other dtypes, quantized, distributed, offloaded or on an accelerator are left as they are, and all of them where
    torch came without MKL.

    Call it on a model that will only be used, pruned or not. FSDP and `safetensors.torch.save_file` refuse parameters
    that are not contiguous, and `save_pretrained` those that two modules share; [`copy_parameters`] does not bring rows
    back, loading again does. Moving the model to another device or dtype keeps the layout.

    Args:
        model (`torch.nn.Module`): Changed in place.

    Returns:
        `torch.nn.Module`: The same model.

    Example:

    ```python
    >>> model = lay_out_for_generation(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)))
    >>> model(torch.ones(1, 8)).shape
    torch.Size([1, 8])

    ```
    """
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return model
    linears = {id(module.weight) for module in model.modules() if type(module) is nn.Linear}
    for parameter in _plain_parameters(model):
        if id(parameter) in linears and parameter.dtype == torch.float32:
            parameter.data = parameter.data.T.clone(memory_format=torch.contiguous_format).T
    return model


def _plain_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters that are ordinary tensors on the CPU; a quantized or distributed one is of another type."""
    return [
        parameter
        for parameter in model.parameters()
        if type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor and parameter.device.type == "cpu"
    ]
