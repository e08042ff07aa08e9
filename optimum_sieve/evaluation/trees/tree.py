"""Turn the rows of an example into a tree of tokens, and divide an example with many. Does not import torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from optimum_sieve.evaluation.encoding import EncodedExample


# Up to so many tokens, the scores of attention take less memory than the other activations.
_SHORT_TREE = 1024


def merge_prefixes(sequences: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Drop every sequence that is a prefix of another; return the rest and the index there of each sequence."""
    kept: list[list[int]] = []
    owners = [0] * len(sequences)
    previous: list[int] | None = None
    # In descending order, a sequence directly follows a sequence that it is a prefix of, if any.
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i], reverse=True):
        if previous is None or previous[: len(sequences[i])] != sequences[i]:
            kept.append(sequences[i])
        owners[i] = len(kept) - 1
        previous = sequences[i]
    return kept, owners


class Tree(NamedTuple):
    """Rows as one row in which tokens that several begin with occur once, in depth-first order.

    Token `i` continues token `j` if `j <= i < ends[j]`.

    Args:
        tokens (`list[int]`): The token ids.
        depths (`list[int]`): Position of each token in its text.
        ends (`list[int]`): Place after the last token that continues each token.
        places (`list[list[int]]`): For each of the rows, the place of each of its tokens.
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    places: list[list[int]]


def tree_of(rows: Iterable[Sequence[int]]) -> Tree:
    """Return the tree of sorted rows.

    Example:

    ```python
    >>> tree = tree_of([[5, 6, 9], [5, 6, 8, 3], [5, 6, 8, 2]])
    >>> tree.tokens, tree.depths, tree.ends
    ([5, 6, 9, 8, 3, 2], [0, 1, 2, 2, 3, 3], [6, 6, 3, 6, 5, 6])
    >>> tree.places
    [[0, 1, 2], [0, 1, 3, 4], [0, 1, 3, 5]]

    ```
    """
    tree = Tree([], [], [], [])
    path: list[int] = []
    before: Sequence[int] = ()
    # Each row begins like the one before it as far as like any earlier one.
    for row in rows:
        shared, count = _shared(before, row), len(tree.tokens)
        for node in path[shared:]:
            tree.ends[node] = count
        path = [*path[:shared], *range(count, count + len(row) - shared)]
        tree.tokens.extend(row[shared:])
        tree.depths.extend(range(shared, len(row)))
        tree.ends.extend([0] * (len(row) - shared))
        tree.places.append(path)
        before = row
    for node in path:
        tree.ends[node] = len(tree.tokens)
    return tree


def as_tree(example: EncodedExample) -> EncodedExample:
    """Return the example with the tree of its rows as its only row; one of one row is returned as it is."""
    if len(example.rows) == 1:
        return example
    tree = tree_of(example.rows)
    reads = [(0, tree.places[row][position], token, candidate) for row, position, token, candidate in example.reads]
    return replace(example, rows=[tree.tokens], reads=reads, depths=tree.depths, ends=tree.ends)


def tree_tokens(rows: Iterable[Sequence[int]]) -> int:
    """Return the number of distinct tokens of sorted rows: those of their tree.

    Example:

    ```python
    >>> tree_tokens([[5, 6, 9], [5, 6, 8, 3], [5, 6, 8, 2]])
    6

    ```
    """
    count = 0
    before: Sequence[int] = ()
    for row in rows:
        count += len(row) - _shared(before, row)
        before = row
    return count


def prompt_length(example: EncodedExample) -> int:
    """Return the number of tokens before the first one that is scored."""
    return 1 + min(position for _, position, _, _ in example.reads)


def tree_limit(length: int, batch_size: int) -> int:
    """Return the most tokens of a tree that takes no more memory than `batch_size` rows of this length.

    It has no more tokens than the rows. In long ones the scores of attention count most, which are quadratic: it has no
    more of them either.
    """
    return min(batch_size * length, max(_SHORT_TREE, math.isqrt(batch_size) * length))


def divided(example: EncodedExample, batch_size: int, *, trees: bool) -> list[EncodedExample]:
    """Divide an example into parts with some of its candidates, none larger than `batch_size` of its rows.

    Args:
        example (`EncodedExample`): The example, not a tree.
        batch_size (`int`): Maximum rows.
        trees (`bool`): Whether each part will be made a tree, of at most [`tree_limit`] tokens.
    """
    limit = tree_limit(example.length, batch_size) if trees else batch_size
    parts: list[list[int]] = [[]]
    size = 0
    for number, row in enumerate(example.rows):
        own = len(row) if trees else 1
        added = own - (_shared(example.rows[number - 1], row) if trees and parts[-1] else 0)
        if parts[-1] and size + added > limit:
            parts.append([])
            size, added = 0, own
        parts[-1].append(number)
        size += added
    return [example] if len(parts) == 1 else [_part(example, part) for part in parts]


def _part(example: EncodedExample, numbers: Sequence[int]) -> EncodedExample:
    """Return the example with only the rows of these numbers."""
    places = {number: place for place, number in enumerate(numbers)}
    reads = [(places[row], *rest) for row, *rest in example.reads if row in places]
    return replace(example, rows=[example.rows[number] for number in numbers], reads=reads)  # type: ignore[arg-type]


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
