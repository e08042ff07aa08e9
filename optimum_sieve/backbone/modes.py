"""Context managers for a model's training mode, its gradients and the precision of its products."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# A smaller matrix would gain nothing from rounded products.
_LEAST_ELEMENTS = 2**15


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


@cache
def multiplies_bfloat16_fast() -> bool:
    """Return whether the CPU multiplies bfloat16 matrices several times as fast as float32 ones (AMX)."""
    # Earlier versions of PyTorch have neither.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16")) and hasattr(torch.backends.mkldnn, "matmul")


def gains_by_rounding(weight: torch.Tensor) -> bool:
    """Return whether products with a weight are much faster with their factors rounded to bfloat16."""
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and weight.numel() >= _LEAST_ELEMENTS and multiplies_bfloat16_fast()


@contextmanager
def rounded_products() -> Iterator[None]:
    """Round the factors of float32 matrix products on the CPU to bfloat16; sums stay in float32.

    Attention must not run inside the context: PyTorch's kernel for it becomes several times as slow.
    """
    backend: Any = torch.backends.mkldnn
    setting = backend.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


class _RoundedLinear(torch.autograd.Function):
    """`nn.functional.linear` with rounded products in both passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.shape = x.shape
        # The inputs of frozen weights need not be kept.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        with rounded_products():
            return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        by_x = by_weight = by_bias = None
        with rounded_products():
            if ctx.needs_input_grad[0]:
                by_x = (rows @ weight).view(ctx.shape)
            if ctx.needs_input_grad[1]:
                by_weight = rows.T @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            by_bias = rows.sum(dim=0)
        return by_x, by_weight, by_bias


@contextmanager
def rounded_linears(model: nn.Module) -> Iterator[None]:
    """Run the linear layers of a float32 model with rounded products where that is much faster, see `rounded_products`.

    Gradients then have relative errors near 1 %, far below the noise of the examples that moments and training steps
    take them from. Scores are computed without.
    """
    with ExitStack() as stack:
        for layer in model.modules():
            # Not subclasses, or layers that accelerate has wrapped, which may compute something else.
            if not isinstance(layer, nn.Linear) or type(layer) is not nn.Linear or "forward" in vars(layer):
                continue
            if gains_by_rounding(layer.weight):
                layer.forward = partial(_rounded, layer)  # type: ignore[method-assign]
                stack.callback(delattr, layer, "forward")
        yield


def _rounded(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = _RoundedLinear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return output
