"""Examples with many candidates whose tokens must be computed: calibration and training compute some of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .encoding import encode_examples


if TYPE_CHECKING:
    from collections.abc import Sequence

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


def with_candidates(example: Example, chosen: Sequence[int]) -> Example:
    """Return an example with some of its candidates, by index; its target is among them, or it has none."""
    divisors, target = example.normalized, example.target
    return replace(
        example,
        candidates=tuple(example.candidates[number] for number in chosen),
        normalized=tuple(divisors[number] for number in chosen) if isinstance(divisors, tuple) else divisors,
        target=None if target is None or target not in chosen else list(chosen).index(target),
    )
