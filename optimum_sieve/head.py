"""A model's head, called at the tokens that are looked at alone. Needs torch alone."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def head_at(model: nn.Module, sites: torch.Tensor, shape: torch.Size) -> Iterator[list[bool]]:
    """Let a model's head see the hidden states at some sites alone, (1, sites, features), inside the context.

    A vocabulary is many times as wide as the states: logits at all positions would be the largest tensor of a run.

    Returns:
        `list[bool]`: Holds something afterwards where the head was called as expected.
    """
    owner: Any = model
    head = owner.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    chosen: list[bool] = []

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = args[0] if args else None
        if not isinstance(states, torch.Tensor) or states.dim() != 3 or states.shape[:2] != shape:
            return None
        rows, positions = sites.to(states.device).unbind(dim=1)
        chosen.append(True)
        return (states[rows, positions][None], *args[1:])

    if not isinstance(head, nn.Module):
        yield chosen
        return
    handle = head.register_forward_pre_hook(choose)
    try:
        yield chosen
    finally:
        handle.remove()
