"""Draw some of an example's many candidates for training: the gold one and random others, other ones in each copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.evaluation.many import with_candidates


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from optimum_sieve.tasks import Example


def drawn_copies(
    examples: Sequence[Example],
    most: int,
    copies: int,
    *,
    seed: int,
    log_probs: NDArray[np.float64] | None = None,
) -> tuple[list[Example], list[list[int]]]:
    r"""Return copies of the examples, each with at most `most` of its candidates.

    The gold candidate is kept. The others are drawn without replacement, uniformly or from the mean of the uniform
    distribution and \(p\), so that those between which the model decides are among them.

    Args:
        examples (`Sequence[Example]`): Examples with candidates.
        most (`int`): Candidates of a copy, at least 2.
        copies (`int`): Copies of each example.
        seed (`int`): Seed of the draws, which depend on it, the example and the copy alone.
        log_probs (`numpy.ndarray` of shape `(count, candidates)`, *optional*): \(\log p\) of all candidates.

    Returns:
        `tuple[list[Example], list[list[int]]]`: All examples, once for each copy, and the indices of their candidates,
        ascending.
    """
    fewer, chosen = [], []
    for copy in range(copies):
        for number, example in enumerate(examples):
            probabilities = None if log_probs is None else np.exp(log_probs[number, : len(example.candidates)])
            rng = np.random.default_rng((seed, copy, number))
            chosen.append(_drawn(example, most, probabilities, rng))
            fewer.append(with_candidates(example, chosen[-1]))
    return fewer, chosen


def _drawn(
    example: Example, most: int, probabilities: NDArray[np.float64] | None, rng: np.random.Generator
) -> list[int]:
    count = len(example.candidates)
    if count <= most:
        return list(range(count))
    weights = np.ones(count) if probabilities is None else probabilities / probabilities.sum() + 1 / count
    kept = [] if example.target is None else [example.target]
    weights[kept] = 0.0
    others = rng.choice(count, size=most - len(kept), replace=False, p=weights / weights.sum())
    return sorted([*kept, *others.tolist()])
