r"""Collect the moments of every target layer while the model reads the calibration examples.

Hooks and the pass over the data are here; the arithmetic is in `moments`. Needs torch alone: what a batch is and how
its loss is computed are arguments.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import nn

from .experts import SeparateExperts, separate_names
from .moments import Moments, accumulate_moments, check_finite, empty_moments, watches_outputs
from .targets import Target, linear_weight


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from .moments import TokenWeights


class CalibrationBatch(Protocol):
    """What calibration reads of a batch: the masks that tell tokens from padding, and the number of examples."""

    @property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """Masks (rows, length), nonzero at tokens: one, or those of encoder and decoder, of different lengths."""

    @property
    def num_examples(self) -> int:
        """Examples in the batch."""


BatchT = TypeVar("BatchT", bound=CalibrationBatch)
_Masks = tuple[torch.Tensor, ...]


def collect_moments(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[BatchT],
    loss: Callable[[nn.Module, BatchT], torch.Tensor],
    *,
    projection: str = "joint",
    num_examples: int,
    weights: Mapping[str, torch.Tensor] | None = None,
    token_weights: Mapping[str, TokenWeights] | None = None,
) -> dict[str, Moments]:
    """Run the model over `batches` and return the moments of each target by name.

    Sums are over tokens and independent of how the examples are batched and padded, up to rounding. They are held in
    float32 on the device of each weight. Parameters' `requires_grad` and the training mode are restored.

    Args:
        model (`torch.nn.Module`): The model, on its device; its targets may hold factors already.
        targets (`Sequence[Target]`): Layers to watch.
        batches (`Iterable`): Batches, already on the model's device.
        loss (`Callable`): Maps `(model, batch)` to the *sum* of the examples' losses; only called with gradients on for
            the joint projection.
        projection (`str`): `"joint"`, `"activation"` or `"learned"`.
        num_examples (`int`): Examples in all batches, by which the sums are divided.
        weights (`Mapping[str, torch.Tensor]`, *optional*): Weight (out, in) of each target that the moments are for;
            `None`: the one it has now.
        token_weights (`Mapping[str, Callable]`, *optional*): How the tokens of each target are weighted in joint
            moments, see [`accumulate_moments`][optimum_sieve.moments.accumulate_moments].

    Raises:
        ValueError: If a loss or a moment is not finite, or a target is never called; the message names the layer.
    """
    if weights is None:
        weights = {target.name: linear_weight(model.get_submodule(target.name)) for target in targets}
    moments = {name: empty_moments(weight, projection=projection) for name, weight in weights.items()}

    def accumulate(name: str, x: torch.Tensor, g: torch.Tensor | None) -> None:
        weight = weights[name]
        accumulate_moments(
            moments[name],
            weight,
            x,
            g,
            on_outputs=watches_outputs(weight, projection),
            scaling=1 / num_examples,
            token_weights=None if token_weights is None else token_weights[name],
        )

    names = [target.name for target in targets]
    visit_tokens(model, names, batches, loss, accumulate, gradients=projection == "joint")
    for name, collected in moments.items():
        check_finite(name, collected)
    return moments


def direction_gradients(
    model: nn.Module,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    batches: Iterable[BatchT],
    loss: Callable[[nn.Module, BatchT], torch.Tensor],
) -> dict[str, torch.Tensor]:
    r"""Return the derivative of the loss by a gate on each direction of some layers, \(l_j^\top (\sum g x^\top) r_j\).

    Args:
        model (`torch.nn.Module`): The model, on its device; the layers may be pruned.
        factors (`Mapping[str, tuple]`): Left (out, directions) and right (directions, in) factors by layer name,
            whether the layer holds those directions or not.
        batches (`Iterable`): Batches, already on the model's device.
        loss (`Callable`): Maps `(model, batch)` to the *sum* of the examples' losses.

    Returns:
        `dict[str, torch.Tensor]`: Summed over all examples, float64 (directions,), on the CPU.

    Raises:
        ValueError: If a loss is not finite, or a layer is never called.
    """
    sums = {name: torch.zeros(right.shape[0], dtype=torch.float64) for name, (_, right) in factors.items()}

    def accumulate(name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        left, right = factors[name]
        sums[name] += ((x.float() @ right.T.float()) * (g @ left.float())).sum(dim=0).double().cpu()

    visit_tokens(model, list(factors), batches, loss, accumulate)
    for name, values in sums.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"The gradients of {name!r} must be finite, got infinity or NaN. Load in float32.")
    return sums


def visit_tokens(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[BatchT],
    loss: Callable[[nn.Module, BatchT], torch.Tensor],
    visit: Callable[..., None],
    *,
    gradients: bool = True,
) -> None:
    """Run the model over `batches`; `visit(name, x, g)` sees the tokens of every call of the named layers.

    `x` (tokens, in) are a layer's inputs in the model's dtype, and `g` (tokens, out), float32, gradients of the loss
    at its outputs, or `None` without gradients. Padding is left out; tokens are in the order of the batch's mask.
    Parameters' `requires_grad` and the training mode are restored.

    Args:
        model (`torch.nn.Module`): The model, on its device; the layers may be pruned.
        names (`Sequence[str]`): Module names of the layers.
        batches (`Iterable`): Batches, already on the model's device.
        loss (`Callable`): Maps `(model, batch)` to the *sum* of the examples' losses.
        visit (`Callable`): Called as the layers are reached, backward through the model where gradients are taken.
        gradients (`bool`): Whether gradients are taken.

    Raises:
        ValueError: If a loss is not finite, or a layer is never called; the message names it.
    """
    modules = {name: model.get_submodule(name) for name in names}
    scale = _loss_scale(model.parameters()) if gradients else 1.0

    def accumulate(name: str, masks: _Masks, x: torch.Tensor, g: torch.Tensor | None) -> None:
        visit(name, _token_rows(x, masks), None if g is None else _token_rows(g, masks).float() / scale)

    # No token may be routed to an expert: it is worthless to the task then.
    reached = {name for name in modules if name.startswith(tuple(f"{experts}." for experts in separate_names(model)))}
    with _frozen(model), torch.set_grad_enabled(gradients):
        for batch in batches:
            watch = partial(_dispatch, accumulate, batch.masks, gradients)
            with _watching(modules, watch, reached), _padding_unrouted(model, batch.masks):
                value = loss(model, batch)
                _check_reached(modules, reached)
                if not torch.isfinite(value):
                    raise ValueError(
                        f"The calibration loss must be finite, got {value.item()}. "
                        "Check the model's weights for NaN, or load it in bfloat16 or float32 instead of float16."
                    )
                if gradients:
                    (value * scale).backward()  # type: ignore[no-untyped-call]


def _loss_scale(tensors: Iterable[torch.Tensor]) -> float:
    """Factor of the loss, by which gradients are divided again in float32: below 6e-8, float16 ones underflow."""
    return 1024.0 if any(tensor.dtype == torch.float16 for tensor in tensors) else 1.0


def _token_rows(values: torch.Tensor, masks: _Masks) -> torch.Tensor:
    """Flatten `values` (..., features) to the rows of tokens; all rows where the shape follows no mask."""
    rows = values.detach().reshape(-1, values.shape[-1])
    mask = next((mask for mask in masks if mask.numel() == rows.shape[0]), None)
    return rows if mask is None else rows[mask.reshape(-1).bool().to(rows.device)]


def _dispatch(
    accumulate: Callable[..., None],
    masks: _Masks,
    needs_gradient: bool,
    name: str,
    x: torch.Tensor,
    y: torch.Tensor,
) -> torch.Tensor:
    """Watch one call of a layer; return what takes the place of its output."""
    if not needs_gradient:
        accumulate(name, masks, x, None)
        return y
    starts = not y.requires_grad
    if starts:
        # Parameters are frozen, so the first layers' outputs start the graph.
        y = y.detach().requires_grad_(True)
    y.register_hook(lambda g: accumulate(name, masks, x, g))  # type: ignore[no-untyped-call]
    # Some models change it in place, which autograd forbids for the start of a graph.
    return y.clone() if starts else y


def _check_reached(modules: Mapping[str, nn.Module], reached: set[str]) -> None:
    """Refuse layers that the examples do not run through: they would look worthless and be removed."""
    missing = [name for name in modules if name not in reached]
    if missing:
        raise ValueError(
            f"`target_modules` must be layers that the examples run through, got {len(missing)} that were not called, "
            f"such as {missing[0]!r}. Name them in `exclude_modules`."
        )


@contextmanager
def _watching(
    modules: dict[str, nn.Module], callback: Callable[[str, Any, Any], torch.Tensor], reached: set[str]
) -> Iterator[None]:
    """Put `callback(name, input, output)` in place of each module's output, and note the names in `reached`."""

    def make_hook(name: str) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: Any, output: Any) -> torch.Tensor:
            reached.add(name)
            return callback(name, args[0].detach(), output)

        return hook

    handles = [module.register_forward_hook(make_hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _padding_unrouted(model: nn.Module, masks: _Masks) -> Iterator[None]:
    """Route padding to no expert: which rows of an expert's input were tokens cannot be told afterwards."""

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


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
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
