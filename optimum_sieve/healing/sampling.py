"""Which examples a step of healing is made of: pure functions of the step's place. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Sequence


def interleaved(weights: Sequence[float], count: int) -> list[int]:
    """Return which of several lessons each of `count` examples is of: the one that lies farthest behind its share next.

    So none is ever a whole example ahead of its share of those drawn.

    Example:

    ```python
    >>> interleaved([1.0, 2.0], 6)
    [1, 0, 1, 1, 0, 1]

    ```
    """
    shares = np.array(weights) / sum(weights)
    given = np.zeros(len(weights))
    order = []
    for place in range(count):
        behind = int(np.argmax(shares * (place + 1) - given))
        given[behind] += 1
        order.append(behind)
    return order


def drawn_examples(places: range, num_examples: int, seed: int) -> list[int]:
    """Return the examples of some places: all are drawn once, in random order, before any is drawn again."""
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(num_examples)
              for epoch in {place // num_examples for place in places}}  # fmt: skip
    return [int(orders[place // num_examples][place % num_examples]) for place in places]
