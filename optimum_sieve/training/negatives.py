"""Draw some of an example's many candidates for training: the gold one and random others, other ones in each copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from optimum_sieve.evaluation.encoding import encode_examples


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from optimum_sieve.backbone.kinds import InputFormat
    from optimum_sieve.tasks import Example


# Parts of its candidates that each example is trained with, which the epochs take in turn.
COPIES = 4


def has_many_candidates(
    examples: Sequence[Example], most: int, tokenizer: PreTrainedTokenizerBase, inputs: InputFormat
) -> bool:
    """Return whether an example has more than `most` candidates and tokens that are computed for them alone.

    Candidates of one token cost nothing more than their prompt. With `most=0` no number is too many.
    """
    many = (example for example in examples if len(example.candidates) > most > 0)
    # One at a time, as the first one tells in most tasks.
    return any(len(row.rows) > 1 for each in many for row in encode_examples([each], tokenizer, True, inputs))


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
            fewer.append(example.with_candidates(chosen[-1]))
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
