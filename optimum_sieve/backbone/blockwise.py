r"""Run a model one block at a time, over all batches before the next block.

A loss and its gradients need every block, but not all at once. Forward, block by block: the hidden states of all
batches before each block are kept in a [`Spool`]. Then backward: each block computes its outputs again, from the states
before it, and takes the gradient of the states after it back to those before it. One block's weights and moments, and
one batch's activations in it, are held at a time; it costs each block a second forward pass. The result is that of
running the whole model, up to rounding.

What a model does around its blocks (masks, positions, embeddings, heads) is left to its own code: every run calls the
whole model, in which all blocks but one pass the hidden states on. Needs torch alone.
"""

from __future__ import annotations

import contextlib
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .hooks import Watch, check_loss
from .modes import loss_scale
from .targets import block_lists


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


BatchT = TypeVar("BatchT")


class _ReachedError(Exception):
    """Ends a forward pass after the block that was wanted."""


def find_blocks(model: nn.Module) -> list[str]:
    """Return the names of the model's blocks, in order.

    Raises:
        ValueError: If the model has not one sequence of blocks.
    """
    lists = block_lists(model)
    if len(lists) != 1:
        raise ValueError(
            f"`memory_limit` must be for a model with one sequence of blocks, got {type(model).__name__} with "
            f"{len(lists)} ({', '.join(lists) or 'none'}). Prune it without a limit."
        )
    return [f"{lists[0]}.{name}" for name, _ in model.get_submodule(lists[0]).named_children()]


def check_blocks(model: nn.Module, blocks: Sequence[str], read: Callable[[], object]) -> None:
    """Refuse a model whose blocks do not each take what the one before it returns.

    Args:
        model (`torch.nn.Module`): The model.
        blocks (`Sequence[str]`): From [`find_blocks`].
        read (`Callable`): Runs the model once.

    Raises:
        ValueError: The message names the block.
    """
    passed: list[torch.Tensor] = []

    def check(name: str, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        place = len(passed)
        in_order = place < len(blocks) and blocks[place] == name
        if not in_order or (passed and _given_states(args, kwargs) is not passed[-1]) or not torch.is_tensor(outputs):
            raise ValueError(
                "`memory_limit` must be for a model in which each block is given what the one before it returns, and "
                f"nothing else, got {type(model).__name__}, where `{name}` is not. Prune it without a limit."
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
            f"not run `{blocks[len(passed)]}`. Prune it without a limit."
        )


class Spool:
    """Tensors by name, in memory or as files of a directory.

    Args:
        directory (`Path`, *optional*): An empty directory. `None`: they stay in memory.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._tensors: dict[str, torch.Tensor] = {}

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Keep a tensor, in place of one of that name."""
        if self._directory is None:
            self._tensors[name] = tensor.detach()
        else:
            save_file({"tensor": tensor.detach().contiguous().cpu()}, self._directory / name)

    def get(self, name: str, device: torch.device) -> torch.Tensor:
        """Return a tensor.

        Raises:
            KeyError: If there is none of that name; FileNotFoundError where they are files.
        """
        if self._directory is None:
            return self._tensors[name].to(device)
        return load_file(self._directory / name, device=str(device))["tensor"]

    def drop(self, name: str) -> None:
        """Forget a tensor, if it is there."""
        if self._directory is None:
            self._tensors.pop(name, None)
        else:
            (self._directory / name).unlink(missing_ok=True)


class BlockRun(Generic[BatchT]):
    """One run of a model over some batches, driven block by block.

    The model must be in evaluation mode, its parameters without gradients: see
    [`frozen`][optimum_sieve.backbone.modes.frozen].

    Args:
        model (`torch.nn.Module`): The model. Blocks may be changed between two calls, but not what surrounds them.
        blocks (`Sequence[str]`): From [`find_blocks`].
        batches (`Sequence`): The batches, on any device.
        read (`Callable`): Maps `(model, batch)`, the batch on `device`, to what is wanted: a loss, or scores.
        device (`torch.device`): Where the model takes its inputs.
        spool (`Spool`): Keeps the states between blocks.

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
        """Run one block over all batches; those before it must have been run.

        Args:
            block (`int`): Place of the block.
            watch (`Watch`, *optional*): Is shown the inputs of the block's layers.
            keep_inputs (`bool`): Whether the states before the block are kept, which `backward` needs.
        """
        for number, batch in enumerate(self._moved()):
            with self._watched(watch, batch):
                _, outputs = self._run(block, number, batch)
            self._spool.put(f"states-{block + 1}-{number}", outputs)
            if not keep_inputs:
                self._spool.drop(f"states-{block}-{number}")

    @torch.no_grad()
    def outputs(self) -> Iterator[torch.Tensor]:
        """Yield what `read` makes of each batch, from the states after the last block."""
        for number, batch in enumerate(self._moved()):
            with self._passing(self._states(len(self.blocks), number)):
                yield self._read(self.model, batch)

    def start_backward(self) -> None:
        """Take the gradients of `read`, a loss, at the states after the last block.

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
        """Take the gradients through one block; the blocks after it must have been gone through.

        Args:
            block (`int`): Place of the block.
            watch (`Watch`): Is shown the tokens of the block's layers.
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
        found: list[torch.Tensor] = []

        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
            states = _given_states(args, kwargs)
            # Before the first block they are what the model makes of the batch.
            if block:
                states = self._states(block, number).to(states.device)
            states = states.detach().requires_grad_(gradients)
            kwargs |= {} if args else {"hidden_states": states}
            outputs = forward(*(states for _ in args[:1]), *args[1:], **kwargs)
            found.extend((states, outputs))
            raise _ReachedError

        with contextlib.suppress(_ReachedError), self._passing(block=block, run=run):
            self._read(self.model, batch)
        return found[0], found[1]

    @contextmanager
    def _passing(
        self, last: torch.Tensor | None = None, *, block: int | None = None, run: Callable[..., Any] | None = None
    ) -> Iterator[None]:
        """Let every block pass the hidden states on, the last one `last` in their place, and one `run` instead."""
        with ExitStack() as stack:
            for place, name in enumerate(self.blocks):
                module = self.model.get_submodule(name)
                ends = place == len(self.blocks) - 1
                own: Callable[..., Any] = partial(_pass_on, last if ends else None)
                if place == block and run is not None:
                    own = partial(run, module.forward)
                stack.enter_context(_replaced_forward(module, own))
            yield


def _given_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    states: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def _pass_on(states: torch.Tensor | None, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _given_states(args, kwargs) if states is None else states


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put `forward` in place of a module's own inside the context."""
    # Offloading puts a function of its own there.
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
