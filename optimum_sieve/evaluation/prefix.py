"""Compute the prefix shared by all prompts of a task (instructions, few-shot examples) once, not for every row."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from .batches import Batch


# For shorter prefixes, handling the cache costs more than it saves.
LEAST_TOKENS = 16


def shared_prefix(batches: Sequence[Batch]) -> int:
    """Return the length of the prefix shared by all rows, ending before the first position to read.

    With few-shot prompts it covers everything before the example's text. Returns 0 if the prefix is too short to pay
    off, and for models that are not causal.
    """
    if batches[0].kind != "causal":
        return 0
    first = batches[0].input_ids[0]
    length = min(int(batch.sites[:, 1].min()) for batch in batches)
    for batch in batches:
        length = min(length, batch.input_ids.shape[1])
        differs = (batch.input_ids[:, :length] != first[:length]).any(dim=0).nonzero()
        length = min(length, int(differs[0, 0])) if len(differs) else length
    return length if length >= LEAST_TOKENS else 0


def prefill(model: nn.Module, ids: torch.Tensor, past: DynamicCache | None = None) -> DynamicCache | None:
    """Return the model's cache of a row of tokens, or `None` if it does not use a `DynamicCache`.

    Args:
        model (`torch.nn.Module`): The model.
        ids (`torch.Tensor` of shape `(1, length)`): The tokens after those of `past`.
        past (`DynamicCache`, *optional*): Cache of the tokens before them, not modified.
    """
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "use_cache": True}
    if past is not None:
        mask = torch.ones(1, past.get_seq_length() + ids.shape[1], dtype=torch.long, device=ids.device)
        arguments |= {"past_key_values": repeated(past, 1), "attention_mask": mask}
    outputs: Any = model(input_ids=ids, **arguments)
    cache = getattr(outputs, "past_key_values", None)
    return cache if type(cache) is DynamicCache else None


def repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    """Return a copy of a one-row cache repeated to `rows` rows, which a forward pass may modify."""
    copied = copy.deepcopy(cache)
    copied.batch_repeat_interleave(rows)
    return copied


def without_prefix(batch: Batch, length: int) -> Batch:
    """Return the batch without its first `length` tokens; its masks and trees still cover them."""
    sites = batch.sites.clone()
    sites[:, 1] -= length
    return replace(batch, input_ids=batch.input_ids[:, length:], sites=sites)
