"""Hooks that pass the input tokens of layers, and the gradients of the loss at their outputs, to a function."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optimum_sieve.modeling.experts import SeparateExperts, separate_names

from .modes import loss_scale


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Masks = tuple[torch.Tensor, ...]


class Watch:
    """Observe the tokens of every call of some layers.

    Args:
        model (`torch.nn.Module`): The model; the layers may be pruned.
        names (`Sequence[str]`): Module names of the layers.
        visit (`Callable`): Called with a layer's name, its inputs `x` (tokens, in) in the model's dtype and the
            gradients `g` (tokens, out) of the loss at its outputs, float32, or `None` without gradients. Padding is
            excluded; tokens are in the order of the batch's attention mask.
        gradients (`bool`): Whether to compute gradients; `visit` is then called during the backward pass.

    Example:

        watch = Watch(model, names, visit, gradients=True)
        with frozen(model), watch.batch(batch.masks):
            (loss(model, batch) * watch.scale).backward()
    """

    def __init__(self, model: nn.Module, names: Sequence[str], visit: Callable[..., None], *, gradients: bool) -> None:
        self.model, self.names, self.gradients = model, tuple(names), gradients
        self.scale = loss_scale(model.parameters()) if gradients else 1.0
        self._visit = visit
        # Experts may receive no token; they are then irrelevant to the task.
        experts = tuple(f"{experts}." for experts in separate_names(model))
        self._reached = {name for name in names if name.startswith(experts)}

    @contextmanager
    def batch(self, masks: Masks) -> Iterator[None]:
        """Observe the calls inside the context; their rows follow one of the attention `masks`.

        Raises:
            ValueError: If a layer was never called; the message names it.
        """
        modules = {name: self.model.get_submodule(name) for name in self.names}
        with ExitStack() as stack:
            for name, module in modules.items():
                handle = module.register_forward_hook(self._hook(name, masks))
                stack.callback(handle.remove)
            stack.enter_context(padding_unrouted(self.model, masks))
            yield
        self._check_reached()

    def _hook(self, name: str, masks: Masks) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
            self._reached.add(name)
            x = args[0].detach()
            if not self.gradients:
                self._visit(name, _token_rows(x, masks), None)
                return y
            starts = not y.requires_grad
            if starts:
                # Parameters are frozen, so the outputs of the first layers start the graph.
                y = y.detach().requires_grad_(True)

            def backward(g: torch.Tensor) -> None:
                self._visit(name, _token_rows(x, masks), _token_rows(g, masks).float() / self.scale)

            y.register_hook(backward)  # type: ignore[no-untyped-call]
            # Some models modify it in place, which autograd forbids for leaf tensors.
            return y.clone() if starts else y

        return hook

    def _check_reached(self) -> None:
        """Reject layers that were never called: they would seem irrelevant and be removed."""
        missing = [name for name in self.names if name not in self._reached]
        if missing:
            raise ValueError(
                f"`target_modules` must be layers that the examples run through, got {len(missing)} that were never "
                f"called (e.g. {missing[0]!r}). Add them to `exclude_modules`."
            )


def check_loss(value: torch.Tensor) -> None:
    """Raise `ValueError` if a calibration loss is not finite."""
    if not torch.isfinite(value):
        raise ValueError(
            f"The calibration loss must be finite, got {value.item()}. "
            "Check the model's weights for NaN, or load it in bfloat16 or float32 instead of float16."
        )


def _token_rows(values: torch.Tensor, masks: Masks) -> torch.Tensor:
    """Flatten `values` (..., features) to token rows without padding; keep all rows if no mask has their shape."""
    rows = values.detach().reshape(-1, values.shape[-1])
    mask = next((mask for mask in masks if mask.numel() == rows.shape[0]), None)
    return rows if mask is None else rows[mask.reshape(-1).bool().to(rows.device)]


@contextmanager
def padding_unrouted(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Route padding to no expert, because an expert's input rows cannot be matched to the mask afterwards."""

    def hook(module: SeparateExperts, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states, index, weights = args
        mask = next((mask for mask in masks if mask.numel() == len(states)), None)
        if mask is not None:
            index = index.masked_fill(~mask.reshape(-1, 1).bool().to(index.device), len(module))
        return states, index, weights

    experts = [module for module in model.modules() if isinstance(module, SeparateExperts)]
    handles = [module.register_forward_pre_hook(hook) for module in experts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
