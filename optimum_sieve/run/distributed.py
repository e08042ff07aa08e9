"""Processes that share one run, started by `accelerate launch`.

Each process holds the whole model and runs the same stages. They divide the batches and sum the results. All of them
read the same work directory; the first process decides whether a result is there, and it alone writes.
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
    """Return accelerate's state of the processes; the first call connects them."""
    # The variable is set by `accelerate launch --cpu`; without an accelerator the CPU is the only choice.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=bool(cpu))


def num_processes() -> int:
    """Return the number of processes."""
    return int(_state().num_processes)


def process_index() -> int:
    """Return the index of this process, from 0."""
    return int(_state().process_index)


def device() -> torch.device:
    """Return the device of this process."""
    return torch.device(_state().device)


def is_first() -> bool:
    """Return whether this process is the one that writes and prints."""
    return process_index() == 0


def share(items: Sequence[ValueT]) -> Sequence[ValueT]:
    """Return the items that this process works on."""
    return items[process_index() :: num_processes()]


def agree(value: ValueT) -> ValueT:
    """Return the value of the first process, a plain object."""
    if num_processes() == 1:
        return value
    values: list[ValueT] = broadcast_object_list([value])
    return values[0]


def sum_over_processes(tensors: Iterable[torch.Tensor]) -> None:
    """Replace tensors by their sums over all processes."""
    if num_processes() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def broadcast(tensors: Iterable[torch.Tensor], source: int) -> None:
    """Replace tensors by those of the process with index `source`."""
    if num_processes() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=source)


def wait() -> None:
    """Wait until every process has called this."""
    _state().wait_for_everyone()
