"""Processes that work on one run together, as `accelerate launch` starts them.

Each has the whole model and runs the same stages. Batches are divided among them and sums added up; whether a result
lies in the work directory, which all of them see, is said by the first, and it alone writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import distributed


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ValueT = TypeVar("ValueT")


def _state() -> PartialState:
    """Return what accelerate knows of the processes; the first call connects them."""
    # `accelerate launch --cpu` says so; without an accelerator there is nothing else.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=bool(cpu))


def size() -> int:
    """Return how many processes there are."""
    return int(_state().num_processes)


def place() -> int:
    """Return this process's place among them, from 0."""
    return int(_state().process_index)


def device() -> torch.device:
    """Return where this process computes, of several."""
    return torch.device(_state().device)


def is_first() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return place() == 0


def share(items: Sequence[ValueT]) -> Sequence[ValueT]:
    """Return this process's part of some items."""
    return items[place() :: size()]


def agree(value: ValueT) -> ValueT:
    """Return the first process's value, a plain object."""
    if size() == 1:
        return value
    (agreed,) = broadcast_object_list([value])
    found: ValueT = agreed
    return found


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors by their sums over all processes."""
    if size() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def hand_out(tensors: Iterable[torch.Tensor], owner: int) -> None:
    """Replace tensors by those of the process at `owner`."""
    if size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=owner)


def wait() -> None:
    """Return once every process has come here."""
    _state().wait_for_everyone()
