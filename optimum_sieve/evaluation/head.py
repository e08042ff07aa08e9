"""Compute logits only at the positions that are scored; choose further positions in the prompts."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable


if TYPE_CHECKING:
    from collections.abc import Iterator

    from .batches import Batch


# Distributions that are normalized at once: few, so that they stay in the processor's cache.
_AT_ONCE = 16


def token_log_probs(logits: torch.Tensor, site: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of some tokens in `float32`, with little memory besides logits and their gradient.

    Differentiable once. A log-softmax of all logits, or autograd through their log-sum-exp, would make several tensors
    of their size, and writing these takes as long as many layers of a pruned model.

    Args:
        logits (`torch.Tensor` of shape `(sites, vocabulary)`): Logits in any floating dtype.
        site (`torch.Tensor` of shape `(tokens,)`): Row of each token's distribution.
        token (`torch.Tensor` of shape `(tokens,)`): The token ids.
    """
    # The gradients of a row's tokens are added before they are rounded.
    logits = logits.float() if logits.requires_grad else logits
    return _TokenLogProbs.apply(logits, site, token)  # type: ignore[no-any-return,no-untyped-call]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, site: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        normalizers = torch.cat([part.float().logsumexp(dim=-1) for part in torch.split(logits, _AT_ONCE)])
        ctx.save_for_backward(logits, normalizers, site, token)
        return logits[site, token].float() - normalizers[site]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, normalizers, site, token = ctx.saved_tensors
        sums = torch.zeros_like(normalizers).index_add(0, site, gradient)
        result = torch.empty_like(logits)
        tensors = (logits, normalizers[:, None], sums[:, None], result)
        for part, normalizer, total, out in zip(*(torch.split(each, _AT_ONCE) for each in tensors), strict=True):
            torch.sub(part, normalizer, out=out).exp_().mul_(-total)
        return result.index_put_((site, token), gradient, accumulate=True), None, None


def prompt_positions(batch: Batch, count: int, seed: int) -> list[list[int]]:
    """Return up to `count` random positions before the answer of each example, ascending.

    They depend on the seed and the example's index, not on the batch. Only causal models predict the prompt's tokens;
    for others there are none.

    Args:
        batch (`Batch`): A batch in which each example is one row, with its gold answer.
        count (`int`): Maximum number of positions of each example.
        seed (`int`): Seed of the choice.
    """
    if batch.kind != "causal":
        return [[] for _ in batch.indices]
    rows, positions = batch.sites.cpu().unbind(dim=1)
    ends = [int(positions[rows == row].min()) for row in range(batch.num_examples)]
    return [
        sorted(np.random.default_rng((seed, index)).permutation(end)[:count].tolist())
        for index, end in zip(batch.indices, ends, strict=True)
    ]


@contextmanager
def head_at(model: nn.Module, sites: torch.Tensor, shape: torch.Size) -> Iterator[list[bool]]:
    """Pass only the hidden states at `sites` to the model's output head, as (1, sites, features).

    The vocabulary is much wider than the hidden states: logits at all positions would be the largest tensor of a run.

    Args:
        model (`torch.nn.Module`): A model of transformers.
        sites (`torch.Tensor` of shape `(sites, 2)`): Row and position of each hidden state to keep.
        shape (`torch.Size`): Shape (rows, length) of the input; hidden states of another shape pass unchanged.

    Returns:
        `list[bool]`: Non-empty after the forward pass if the head received the selected states.
    """
    owner: Any = model
    head = owner.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    selected: list[bool] = []

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        states = args[0] if args else None
        if not isinstance(states, torch.Tensor) or states.dim() != 3 or states.shape[:2] != shape:
            return None
        rows, positions = sites.to(states.device).unbind(dim=1)
        selected.append(True)
        return (states[rows, positions][None], *args[1:])

    if not isinstance(head, nn.Module):
        yield selected
        return
    handle = head.register_forward_pre_hook(select)
    try:
        yield selected
    finally:
        handle.remove()
