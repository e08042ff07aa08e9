"""What the candidates of a task cost: the tokens of an example with them, against those of its prompt. No torch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from optimum_sieve.evaluation.trees.tree import prompt_length, tree_tokens


if TYPE_CHECKING:
    from collections.abc import Sequence

    from optimum_sieve.evaluation.encoding import EncodedExample


def describe_candidates(examples: Sequence[EncodedExample], *, trees: bool) -> str:
    """Say how many candidates the examples have and how many tokens are computed for them, in the mean.

    Args:
        examples (`Sequence[EncodedExample]`): Examples with all of their candidates, as rows.
        trees (`bool`): Whether the model takes the candidates of an example as one tree.
    """
    lengths = [count for example in examples for count in Counter(read[3] for read in example.reads).values()]
    sources = [len(example.source or ()) for example in examples]
    prompts = [source + prompt_length(example) for source, example in zip(sources, examples, strict=True)]
    rows = [len(example.rows) for example in examples]
    if trees:
        tokens = [tree_tokens(example.rows) for example in examples]
    else:
        pairs = zip(sources, examples, strict=True)
        tokens = [sum(source + len(row) for row in example.rows) for source, example in pairs]
    arranged = "" if trees or max(rows) == 1 else f", in {_mean(rows)} rows since the model does not take one tree"
    return (
        f"{_range([example.num_candidates for example in examples])} of {_range(lengths)} "
        f"token{'s' if max(lengths) > 1 else ''}{arranged}: {_mean(tokens)} tokens an example, "
        f"{sum(tokens) / sum(prompts):.1f} times its prompt ({_mean(prompts)})"
    )


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _mean(counts: Sequence[int]) -> str:
    return f"{sum(counts) / len(counts):,.0f}"
