"""The examples and the learning rate of each step: pure functions of the number of the step. Does not import torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_WARMUP = 0.1

# Batches that are sorted by length together: on short texts, four fifths of the padding go, and which examples meet in
# a batch stays mostly random.
_SORTED_BATCHES = 8


def interleaved(weights: Sequence[float], count: int) -> list[int]:
    """Return the index of the lesson that each of `count` examples is drawn from, in proportion to `weights`.

    Each example comes from the lesson that is farthest behind its share, so no lesson is ever more than one example
    ahead.

    Example:

    ```python
    >>> interleaved([1.0, 2.0], 6)
    [1, 0, 1, 1, 0, 1]

    ```
    """
    shares = np.array(weights) / sum(weights)
    given = np.zeros(len(weights))
    order = []
    for drawn in range(1, count + 1):
        behind = int(np.argmax(shares * drawn - given))
        given[behind] += 1
        order.append(behind)
    return order


def drawn_examples(draws: range, lengths: Sequence[int], batch_size: int, seed: int, copies: int = 1) -> list[int]:
    """Return the examples of some draws; every epoch is shuffled anew.

    Padding is wasted work, so `batch_size` draws in turn have similar lengths: of every few batches of the shuffled
    epoch, the examples are sorted by length, and the batches shuffled.

    Args:
        draws (`range`): Numbers of the draws, from 0 in the first epoch.
        lengths (`Sequence[int]`): Length of each example.
        batch_size (`int`): Draws of a step.
        seed (`int`): Seed of the epochs' orders.
        copies (`int`): Copies of the examples, one after the other in `lengths`; epochs take them in turn.
    """
    count = len(lengths) // copies
    epochs = {draw // count for draw in draws}
    firsts = {epoch: epoch % copies * count for epoch in epochs}
    orders = {
        epoch: _epoch(np.array(lengths[first : first + count]), batch_size, (seed, epoch))
        for epoch, first in firsts.items()
    }
    return [firsts[draw // count] + orders[draw // count][draw % count] for draw in draws]


def _epoch(lengths: NDArray[np.int64], batch_size: int, seed: tuple[int, int]) -> list[int]:
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(lengths))
    order: list[int] = []
    for first in range(0, len(shuffled), _SORTED_BATCHES * batch_size):
        window = shuffled[first : first + _SORTED_BATCHES * batch_size]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches = [window[start : start + batch_size] for start in range(0, len(window), batch_size)]
        order += [int(index) for batch in generator.permutation(len(batches)) for index in batches[batch]]
    return order


def step_examples(
    order: Sequence[int],
    lengths: Sequence[Sequence[int]],
    step: int,
    batch_size: int,
    seed: int,
    copies: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the examples of each lesson in a step.

    Args:
        order (`Sequence[int]`): Lesson of each draw, of [`interleaved`].
        lengths (`Sequence[Sequence[int]]`): Length of each example of each lesson.
        step (`int`): Number of the step, from 0.
        batch_size (`int`): Draws of a step.
        seed (`int`): Seed of the epochs' orders.
        copies (`Sequence[int]`, *optional*): Copies of each lesson's examples. Default: one.

    Example:

    ```python
    >>> [sorted(drawn) for drawn in step_examples([0, 1, 1, 0, 1, 1], [[5], [2, 9, 2, 9]], 1, batch_size=3, seed=0)]
    [[0], [0, 1]]

    ```
    """
    start = step * batch_size
    before, chosen = order[:start], order[start : start + batch_size]
    firsts = [before.count(lesson) for lesson in range(len(lengths))]
    return [
        drawn_examples(range(first, first + chosen.count(lesson)), each, batch_size, seed, count)
        for lesson, (first, each, count) in enumerate(zip(firsts, lengths, copies or [1] * len(lengths), strict=True))
    ]


def schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate at `step` (from 0): linear warmup to 1, then cosine decay to 0."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
