"""Arrange the candidates of examples as a model takes them: one tree for each example, or rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from optimum_sieve.evaluation.prefix import LEAST_TOKENS

from .probe import takes_cache, takes_trees
from .tree import as_tree, divided, prompt_length, tree_limit, tree_tokens


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from optimum_sieve.evaluation.encoding import EncodedExample


# Tokens that a cache must save: its two forward passes cost about as much as so many.
_LEAST_SAVED = 4 * LEAST_TOKENS


def arranged(
    examples: Sequence[EncodedExample], model: nn.Module | None, divide_at: int | None = None
) -> list[EncodedExample]:
    """Return encoded examples as `model` reads them with the fewest tokens.

    If the model takes trees, each example becomes one row. Otherwise the rows stay as they are: for scoring, those of
    an example with many candidates get batches of their own, whose prompt is then computed once.

    Args:
        examples (`Sequence[EncodedExample]`): The examples, as rows.
        model (`torch.nn.Module`, *optional*): The model, which may run for a trial. Default: the rows stay.
        divide_at (`int`, *optional*): For scoring, divide examples of more than so many rows into parts with the same
            index. Default: an example stays whole, since a loss needs all of its candidates.
    """
    branching = [example for example in examples if len(example.rows) > 1]
    if not branching:
        return list(examples)
    trees = model is not None and can_be_trees(branching, model, divide_at)
    if divide_at is None:
        return [as_tree(example) for example in examples] if trees else list(examples)
    parts = [part for example in examples for part in divided(example, divide_at, trees=trees)]
    if trees:
        return [as_tree(part) for part in parts]
    paying = [example for example in branching if _pays(example)]
    if model is None or not paying or not takes_cache(model, longest=_longest(paying)):
        return parts
    own = {example.index for example in paying}
    return [replace(part, alone=part.index in own) for part in parts]


def can_be_trees(branching: Sequence[EncodedExample], model: nn.Module, divide_at: int | None = None) -> bool:
    """Return whether `model` reads these examples, each of several rows, as trees; it may run for a trial."""
    if any(example.source is not None for example in branching):
        return False
    sizes = [tree_tokens(example.rows) for example in branching]
    if divide_at is not None:
        limits = (tree_limit(example.length, divide_at) for example in branching)
        sizes = [min(pair) for pair in zip(sizes, limits, strict=True)]
    return takes_trees(model, longest=_longest(branching), largest=max(sizes))


def _longest(examples: Sequence[EncodedExample]) -> int:
    return max(example.length for example in examples)


def _pays(example: EncodedExample) -> bool:
    """Return whether a cache of the prompt saves more than it costs."""
    # A decoder with an encoder has no prompt of its own.
    length = prompt_length(example) - 1 if example.source is None else 0
    return length >= LEAST_TOKENS and (len(example.rows) - 1) * length >= _LEAST_SAVED
