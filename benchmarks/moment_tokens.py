"""The tokens of every layer in a pass over examples, for `benchmarks/moments.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import nn

from optimum_sieve.calibration import visit_tokens
from optimum_sieve.moments import watches_outputs
from optimum_sieve.scoring import Batch


# Layers of one parent that read the same input.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Loss = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass(frozen=True)
class Tokens:
    """Tokens of one call of a layer.

    Args:
        weight (`torch.Tensor` of shape `(out, in)`): The layer's dense weight.
        x (`torch.Tensor` of shape `(tokens, in)`): Inputs.
        g (`torch.Tensor` of shape `(tokens, out)`): Gradients of the loss at the outputs.
        examples (`torch.Tensor` of shape `(tokens,)`): Row of the batch that each token belongs to.
        siblings (`torch.Tensor` of shape `(tokens,)`): `|g|^2` summed over the layers that read this input.
    """

    weight: torch.Tensor
    x: torch.Tensor
    g: torch.Tensor
    examples: torch.Tensor
    siblings: torch.Tensor

    @cached_property
    def inputs(self) -> torch.Tensor:
        """`s` (tokens, k): the outputs of a wide or square layer, the inputs of a tall one."""
        return self.x @ self.weight.T if watches_outputs(self.weight, "joint") else self.x

    @cached_property
    def gradients(self) -> torch.Tensor:
        """`h` (tokens, k): the gradients at the outputs, or brought back to the inputs of a tall layer."""
        return self.g if watches_outputs(self.weight, "joint") else self.g @ self.weight

    @cached_property
    def x_square(self) -> torch.Tensor:
        """`|x|^2` (tokens,)."""
        return self.x.square().sum(dim=1)

    @cached_property
    def g_square(self) -> torch.Tensor:
        """`|g|^2` (tokens,)."""
        return self.g.square().sum(dim=1)


Found = dict[str, dict[str, torch.Tensor]]


class Visitor(Protocol):
    """What is done with the tokens of each call of a layer."""

    def __call__(self, name: str, tokens: Tokens) -> None:
        """See the tokens of one call of layer `name`."""

    def found(self) -> Found:
        """Return tensors by layer and field."""


def visit(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    batches: Iterable[Batch],
    loss: Loss,
    visitors: Sequence[Visitor],
) -> None:
    """Show the tokens of every layer of `weights` (name: dense weight) to all visitors, in one pass over `batches`."""
    waiting: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    groups = sibling_groups(list(weights))
    current: list[Batch] = []

    def noted() -> Iterator[Batch]:
        for batch in batches:
            current[:] = [batch]
            yield batch

    def gather(name: str, x: torch.Tensor, g: torch.Tensor) -> None:
        waiting[name] = (x.float(), g)
        if not all(member in waiting for member in groups[name]):
            return
        examples = current[0].attention_mask.nonzero()[:, 0]
        found = {member: waiting.pop(member) for member in groups[name]}
        siblings = torch.stack([g.square().sum(dim=1) for _, g in found.values()]).sum(dim=0)
        for member, (x, g) in found.items():
            tokens = Tokens(weights[member], x, g, examples, siblings)
            for visitor in visitors:
                visitor(member, tokens)

    visit_tokens(model, list(weights), noted(), loss, gather)


def sibling_groups(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return, for each layer, those of `names` that read the same input, itself included."""
    groups = {name: (name,) for name in names}
    for name in names:
        parent, _, own = name.rpartition(".")
        for suffixes in SIBLINGS:
            if own in suffixes:
                groups[name] = tuple(full for suffix in suffixes if (full := f"{parent}.{suffix}") in groups)
    return groups


def block_groups(names: Sequence[str], groups: int) -> list[list[str]]:
    """Cut layers, in the model's order, into groups of whole blocks; the first number in a name is its block."""
    blocks = [int(next(part for part in name.split(".") if part.isdigit())) for name in names]
    order = sorted(set(blocks))
    group = {block: place * groups // len(order) for place, block in enumerate(order)}
    return [
        [name for name, block in zip(names, blocks, strict=True) if group[block] == number] for number in range(groups)
    ]


def next_token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of every token of the prompts but the first, summed."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    losses = nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), batch.input_ids[:, 1:], reduction="none"
    )
    return (losses * batch.attention_mask[:, 1:]).sum()
