r"""Run a model block by block, each block over all batches before the next.

Only one block's weights and moments and one batch's activations are in memory at a time. The forward pass stores the
hidden states before each block in a [`Spool`][optimum_sieve.run.spool.Spool]. The backward pass recomputes each block's
outputs from these states and backpropagates the gradient through the block, at the cost of a second forward pass per
block. Up to rounding, the result equals that of the whole model.

The model's own code still handles masks, positions, embeddings and heads: every run calls the whole model, but all
blocks except one only pass the hidden states on. Depends on torch only.
"""

from __future__ import annotations

import contextlib
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from .hooks import Watch, check_loss
from .modes import loss_scale
from .targets import block_lists, language_models


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from optimum_sieve.run.spool import Spool


BatchT = TypeVar("BatchT")


class _ReachedError(Exception):
    """Ends a forward pass after the requested block."""


def find_blocks(model: nn.Module) -> list[str]:
    """Return the names of the model's blocks, in order; of a multimodal model those of the language model.

    Raises:
        ValueError: If the model does not have exactly one sequence of blocks.
    """
    inside = language_models(model)
    lists = [name for name in block_lists(model) if not inside or name.startswith(inside)]
    if len(lists) != 1:
        raise ValueError(
            f"`memory_limit` must be for a model with one sequence of blocks, got {type(model).__name__} with "
            f"{len(lists)} ({', '.join(lists) or 'none'}). Omit `memory_limit`."
        )
    return [f"{lists[0]}.{name}" for name, _ in model.get_submodule(lists[0]).named_children()]


def check_blocks(model: nn.Module, blocks: Sequence[str], read: Callable[[], object]) -> None:
    """Check that each block's input is the output of the block before it.

    Args:
        model (`torch.nn.Module`): The model.
        blocks (`Sequence[str]`): Returned by [`find_blocks`].
        read (`Callable`): Runs the model once.

    Raises:
        ValueError: If not; the message names the block.
    """
    passed: list[torch.Tensor] = []

    def check(name: str, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        index = len(passed)
        in_order = index < len(blocks) and blocks[index] == name
        if not in_order or (passed and _input_states(args, kwargs) is not passed[-1]) or not torch.is_tensor(outputs):
            raise ValueError(
                "`memory_limit` must be for a model in which each block receives only the output of the block before "
                f"it, got {type(model).__name__}, where `{name}` does not. Omit `memory_limit`."
            )
        passed.append(outputs)

    with ExitStack() as stack, torch.no_grad():
        for name in blocks:
            hook = partial(check, name)
            handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        read()
    if len(passed) != len(blocks):
        raise ValueError(
            f"`memory_limit` must be for a model that runs all of its blocks, got {type(model).__name__}, which did "
            f"not run `{blocks[len(passed)]}`. Omit `memory_limit`."
        )


class BlockRun(Generic[BatchT]):
    """Run a model over batches block by block.

    The model must be in evaluation mode and its parameters must not require gradients: see
    [`frozen`][optimum_sieve.backbone.modes.frozen].

    Args:
        model (`torch.nn.Module`): The model. Only its blocks may change between calls.
        blocks (`Sequence[str]`): Returned by [`find_blocks`].
        batches (`Sequence`): The batches, on any device.
        read (`Callable`): Maps `(model, batch)`, with the batch on `device`, to the result: a loss, or scores.
        device (`torch.device`): Device of the model's inputs.
        spool (`Spool`): Stores the states between blocks.

    Example:

        run = BlockRun(model, blocks, batches, loss, device=device, spool=Spool())
        for block in range(len(blocks)):
            run.forward(block)
        run.start_backward()
        for block in reversed(range(len(blocks))):
            run.backward(block, names, visit)
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        batches: Sequence[BatchT],
        read: Callable[[nn.Module, BatchT], torch.Tensor],
        *,
        device: torch.device,
        spool: Spool,
    ) -> None:
        self.model, self.blocks, self.batches = model, tuple(blocks), batches
        self._read, self._device, self._spool = read, device, spool
        self._scale = loss_scale(model.parameters())

    @torch.no_grad()
    def forward(self, block: int, watch: Watch | None = None, *, keep_inputs: bool = True) -> None:
        """Run one block over all batches, after all blocks before it.

        Args:
            block (`int`): Index of the block.
            watch (`Watch`, *optional*): Receives the inputs of the block's layers.
            keep_inputs (`bool`): Whether to keep the states before the block for `backward`.
        """
        for number, batch in enumerate(self._moved()):
            with self._watched(watch, batch):
                _, outputs = self._run(block, number, batch)
            self._spool.put(f"states-{block + 1}-{number}", outputs)
            if not keep_inputs:
                self._spool.drop(f"states-{block}-{number}")

    @torch.no_grad()
    def outputs(self) -> Iterator[torch.Tensor]:
        """Yield the result of `read` for each batch, computed from the states after the last block."""
        for number, batch in enumerate(self._moved()):
            with self._passing(self._states(len(self.blocks), number)):
                yield self._read(self.model, batch)

    def start_backward(self) -> None:
        """Compute the gradients of the loss `read` with respect to the states after the last block.

        Raises:
            ValueError: If a loss is not finite.
        """
        for number, batch in enumerate(self._moved()):
            last = self._states(len(self.blocks), number).requires_grad_()
            with torch.enable_grad(), self._passing(last):
                value = self._read(self.model, batch)
                check_loss(value)
                (gradient,) = torch.autograd.grad(value * self._scale, last)
            self._spool.put(f"gradient-{number}", gradient)
            self._spool.drop(f"states-{len(self.blocks)}-{number}")

    def backward(self, block: int, watch: Watch) -> None:
        """Backpropagate through one block, after all blocks behind it.

        Args:
            block (`int`): Index of the block.
            watch (`Watch`): Receives the inputs and output gradients of the block's layers.
        """
        for number, batch in enumerate(self._moved()):
            gradient = self._spool.get(f"gradient-{number}", self._device)
            with torch.enable_grad(), self._watched(watch, batch):
                states, outputs = self._run(block, number, batch, gradients=True)
            outputs.backward(gradient.to(outputs.device))  # type: ignore[no-untyped-call]
            self._spool.drop(f"states-{block}-{number}")
            if block and states.grad is not None:
                self._spool.put(f"gradient-{number}", states.grad)
            else:
                self._spool.drop(f"gradient-{number}")

    def _moved(self) -> Iterator[BatchT]:
        return (batch.to(self._device) for batch in self.batches)  # type: ignore[attr-defined]

    def _states(self, block: int, number: int) -> torch.Tensor:
        return self._spool.get(f"states-{block}-{number}", self._device)

    @contextmanager
    def _watched(self, watch: Watch | None, batch: Any) -> Iterator[None]:
        if watch is None:
            yield
        else:
            with watch.batch(batch.masks):
                yield

    def _run(
        self, block: int, number: int, batch: BatchT, *, gradients: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model up to a block; return the block's inputs and outputs."""
        result: list[torch.Tensor] = []

        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            states = _input_states(args, kwargs)
            # The first block receives its states from the model itself.
            if block:
                states = self._states(block, number).to(states.device)
            states = states.detach().requires_grad_(gradients)
            kwargs |= {} if args else {"hidden_states": states}
            outputs = forward(*(states for _ in args[:1]), *args[1:], **kwargs)
            result.extend((states, outputs))
            raise _ReachedError

        with contextlib.suppress(_ReachedError), self._passing(block=block, run=run):
            self._read(self.model, batch)
        return result[0], result[1]

    @contextmanager
    def _passing(
        self, last: torch.Tensor | None = None, *, block: int | None = None, run: Callable[..., Any] | None = None
    ) -> Iterator[None]:
        """Make every block pass its hidden states on, except that the last returns `last` and `block` calls `run`."""
        with ExitStack() as stack:
            for index, name in enumerate(self.blocks):
                module = self.model.get_submodule(name)
                is_last = index == len(self.blocks) - 1
                forward: Callable[..., Any] = partial(_pass_on, last if is_last else None)
                if index == block and run is not None:
                    forward = partial(run, module.forward)
                stack.enter_context(_replaced_forward(module, forward))
            yield


def _input_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def _pass_on(states: torch.Tensor | None, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _input_states(args, kwargs) if states is None else states


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's `forward` inside the context."""
    # Offloading sets an instance attribute, which has to be restored.
    original = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if original is None:
            del module.forward
        else:
            module.forward = original
