"""The examples of each healing step: pure functions of the number of the step. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Sequence


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
