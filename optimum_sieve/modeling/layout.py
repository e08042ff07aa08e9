"""Memory layout of weights. Saved with the weights of a pruned model."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn


if TYPE_CHECKING:
    from collections.abc import Iterator

Module = TypeVar("Module", bound=nn.Module)


_copies: ContextVar[bool] = ContextVar("_copies", default=True)


@contextmanager
def leaving_parameters() -> Iterator[None]:
    """Let [`copy_parameters`] copy nothing inside the context, for a model that is only compared with its file."""
    token = _copies.set(False)
    try:
        yield
    finally:
        _copies.reset(token)


@torch.no_grad()
def copy_parameters(model: nn.Module) -> None:
    """Copy the parameters on the CPU into newly allocated memory, in place.

    `from_pretrained` leaves them in the memory-mapped file: the first pass reads them from disk, and they may be
    unaligned, which slows matrix-vector products down, on some machines several times.
    """
    for parameter in _plain_parameters(model) if _copies.get() else ():
        parameter.data = parameter.data.clone()


@torch.no_grad()
def lay_out_for_generation(model: Module) -> Module:
    """Store the linears of a float32 model on the CPU column by column, for faster generation.

    A linear that multiplies one row at a time reads its whole weight. Math Kernel Library (MKL) computes dot products
    with the rows of the weight, which takes twice as long for the short rows of a second factor as a sum of columns
    (docs/measurements.md, "Speed"). Values, shapes and, up to rounding, outputs stay the same. Linears that are in
    another dtype, quantized, distributed, offloaded or on an accelerator do not change, and none change if torch was
    built without MKL.

    Call it on a model, pruned or dense, that will only be used for inference. FSDP and `safetensors.torch.save_file`
    refuse parameters that are not contiguous, and `save_pretrained` those that two modules share; [`copy_parameters`]
    does not restore the rows, loading again does. Moving the model to another device or dtype keeps the layout.

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
    """List the parameters that are ordinary tensors on the CPU; quantized and distributed ones have other types."""
    return [
        parameter
        for parameter in model.parameters()
        if type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor and parameter.device.type == "cpu"
    ]
