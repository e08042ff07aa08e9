"""The examples and the learning rate of each step: pure functions of the number of the step. Does not import torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Sequence

_WARMUP = 0.1


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


def drawn_examples(draws: range, num_examples: int, seed: int) -> list[int]:
    """Return the examples of some draws; every epoch is shuffled anew."""
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(num_examples)
              for epoch in {draw // num_examples for draw in draws}}  # fmt: skip
    return [int(orders[draw // num_examples][draw % num_examples]) for draw in draws]


def step_examples(
    order: Sequence[int], counts: Sequence[int], step: int, batch_size: int, seed: int
) -> list[list[int]]:
    """Return the examples of each lesson in a step.

    Args:
        order (`Sequence[int]`): Lesson of each draw, of [`interleaved`].
        counts (`Sequence[int]`): Number of examples of each lesson.
        step (`int`): Number of the step, from 0.
        batch_size (`int`): Draws of a step.
        seed (`int`): Seed of the epochs' orders.

    Example:

    ```python
    >>> [sorted(drawn) for drawn in step_examples([0, 1, 1, 0, 1, 1], [1, 4], step=1, batch_size=3, seed=0)]
    [[0], [1, 3]]

    ```
    """
    start = step * batch_size
    before, chosen = order[:start], order[start : start + batch_size]
    firsts = [before.count(lesson) for lesson in range(len(counts))]
    return [
        drawn_examples(range(first, first + chosen.count(lesson)), count, seed)
        for lesson, (first, count) in enumerate(zip(firsts, counts, strict=True))
    ]


def schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate at `step` (from 0): linear warmup to 1, then cosine decay to 0."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
